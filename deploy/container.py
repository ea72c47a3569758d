"""python3 -m deploy.container: how the serve image starts.

Says whether the image's versions belong together, makes engines for the GPU at hand or takes them
from the cache, and becomes Triton on what came of that. Arguments that it does not know are
Triton's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.engines.__main__ import add_missing_flag, find_ready
from deploy.engines.ready import Missing
from deploy.query_cache import add_cache_flag
from deploy.stopping import DRAIN_S
from deploy.tuning import Profile, add_profile_flag, lay_over, profile_from
from deploy.versions import TRITON_HOME, check_versions
from retrieval_contract.errors import RetrievalError
from retrieval_contract.models import Target


def triton_command(release: Path, target: Target, more: Sequence[str]) -> list[str]:
    """Triton over one release folder."""
    return [
        str(TRITON_HOME / "bin" / "tritonserver"),
        f"--model-repository={release / 'model_repository'}",
        f"--model-config-name={target}",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={DRAIN_S}",
        *more,
    ]


def fitted(release: Path, profile: Profile | None) -> tuple[Path, list[str]]:
    """The release with its configs as a profile says, and Triton's flags for it.

    Laid over links in a temporary folder, which ends with the container.
    """
    if profile is None:
        return release, []
    home = Path(tempfile.mkdtemp(prefix="retrieval-"))
    source = (release / "model_repository").resolve()
    repository = shutil.copytree(source, home / "model_repository", copy_function=os.symlink)
    return home, lay_over(profile, repository)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python3 -m deploy.container", description=__doc__)
    top.add_argument("--release", type=Path, default=Path("/release"))
    top.add_argument("--cache", type=Path, default=Path("/cache"), help="of engines; keep it")
    top.add_argument("--target", choices=[Target.GPU, Target.CPU], default=Target.GPU)
    add_missing_flag(top)
    add_profile_flag(top)
    add_cache_flag(top)
    top.add_argument("--tag", default=os.environ.get("TRITON_TAG", ""), help="of NVIDIA's image")
    return top


def main() -> None:
    """Command line; does not return where all is well."""
    args, more = parser().parse_known_args()
    try:
        print(check_versions(args.tag), file=sys.stderr)
        release, target = args.release, Target(args.target)
        if target is Target.GPU:
            ready = find_ready(release, args.cache, Missing(args.missing))
            release, target = ready.release, ready.target
        release, flags = fitted(release, profile_from(args))
        command = triton_command(release, target, [*flags, *more])
        sys.stderr.flush()
        os.execv(command[0], command)
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    except OSError as exc:  # no Triton here, or a cache that cannot be written
        raise SystemExit(
            f"error: {exc}; run this in the image, with --cache where user {os.getuid()} may write"
        ) from exc


if __name__ == "__main__":
    main()
