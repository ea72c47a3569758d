"""What the drawn shop sells: kinds, colours, patterns, titles, and the queries they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deploy.rendered.photo import Rgb

MIN_PRODUCTS = 30  # room for the first six queries
STOCK = 4  # the least products made to answer each query in full

COLOURS: dict[str, Rgb] = {
    "navy blue": (34, 46, 96),
    "red": (196, 34, 42),
    "mustard yellow": (218, 165, 32),
    "olive green": (106, 106, 50),
    "black": (34, 34, 37),
    "white": (243, 242, 238),
    "grey": (138, 141, 146),
    "pink": (238, 150, 178),
    "purple": (112, 62, 150),
    "orange": (232, 116, 34),
    "brown": (112, 72, 44),
    "teal": (16, 124, 128),
    "beige": (214, 194, 160),
    "sky blue": (128, 182, 222),
    "burgundy": (112, 24, 48),
    "forest green": (28, 92, 56),
}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {
    "navy blue": ("navy blue", "navy"),
    "mustard yellow": ("mustard yellow", "mustard"),
    "olive green": ("olive green", "olive"),
    "grey": ("grey", "gray"),
    "sky blue": ("sky blue", "light blue"),
    "forest green": ("forest green", "dark green"),
    "burgundy": ("burgundy", "wine red"),
    "beige": ("beige", "sand beige"),
}
PATTERN_WORDS = {
    "striped": ("striped", "stripe"),
    "checked": ("checked", "plaid", "gingham"),
    "polka dot": ("polka dot", "spotted", "dotted"),
    "floral": ("floral", "flower print"),
}
AUDIENCE_WORDS = {"women": "women's", "men": "men's", "kids": "kids'", "unisex": "unisex"}
BRANDS = (
    *["Fennimoss", "Brindlewold", "Quillmarsh", "Zorvane", "Pellirusk", "Halvdrim", "Kestrowe"],
    *["Tamberquist", "Ostrelby", "Wexolund", "Mirrowick", "Solvendra", "Nubbinfold", "Yarrowden"],
)
WORN = ("everyday", "classic", "relaxed fit", "soft", "lightweight", "new season", "essential", "")
CARRIED = ("roomy", "compact", "city", "weekend", "smart", "classic", "")
HOUSED = ("handmade", "modern", "cosy", "classic", "country style", "gift boxed", "")
ALL = ("plain", *PATTERN_WORDS)
ANYONE = ("women", "men", "kids", "unisex")
ADULTS = ("women", "men", "unisex")


@dataclass(frozen=True)
class Kind:
    """What sellers say about one kind of product, and its usual price in euros."""

    names: tuple[str, ...]
    extras: tuple[str, ...]
    materials: tuple[str, ...]
    patterns: tuple[str, ...]
    audiences: tuple[str, ...]
    price: float


KNITS = ("wool", "cashmere", "cotton", "acrylic")
KINDS: dict[str, Kind] = {
    "t-shirt": Kind(
        ("t-shirt", "tee", "crew neck t-shirt"),
        WORN,
        ("cotton", "linen", "jersey"),
        ("plain", "striped", "polka dot", "floral"),
        ANYONE,
        18,
    ),
    "shirt": Kind(
        ("shirt", "button-up shirt", "long sleeve shirt"),
        WORN,
        ("cotton", "linen", "flannel"),
        ALL,
        ANYONE,
        35,
    ),
    "dress": Kind(
        ("dress", "summer dress", "sleeveless dress", "frock"),
        WORN,
        ("cotton", "viscose", "linen"),
        ALL,
        ("women", "kids"),
        49,
    ),
    "skirt": Kind(
        ("skirt", "midi skirt", "a-line skirt"),
        WORN,
        ("cotton", "wool", "viscose"),
        ALL,
        ("women", "kids"),
        36,
    ),
    "trousers": Kind(
        ("trousers", "pants", "chinos"),
        WORN,
        ("cotton", "linen", "twill"),
        ("plain", "checked", "striped"),
        ANYONE,
        45,
    ),
    "jacket": Kind(
        ("jacket", "bomber jacket", "zip jacket"),
        WORN,
        ("nylon", "cotton", "wool"),
        ("plain", "checked"),
        ANYONE,
        89,
    ),
    "hoodie": Kind(
        ("hoodie", "hooded sweatshirt", "pullover hoodie"),
        WORN,
        ("cotton", "fleece", "jersey"),
        ("plain", "striped"),
        ANYONE,
        42,
    ),
    "sweater": Kind(
        ("sweater", "jumper", "pullover", "crew neck sweater"),
        WORN,
        KNITS,
        ("plain", "striped", "floral"),
        ANYONE,
        55,
    ),
    "cap": Kind(
        ("cap", "baseball cap", "peaked cap"),
        WORN,
        ("cotton", "twill", "canvas"),
        ("plain", "checked", "striped"),
        ANYONE,
        17,
    ),
    "scarf": Kind(("scarf", "winter scarf", "fringed scarf"), WORN, KNITS, ALL, ADULTS, 25),
    "socks": Kind(
        ("socks", "crew socks", "pair of socks"),
        WORN,
        KNITS,
        ("plain", "striped", "checked", "polka dot"),
        ANYONE,
        9,
    ),
    "sneaker": Kind(
        ("sneakers", "trainers", "lace-up trainers"),
        WORN,
        ("canvas", "leather", "suede"),
        ("plain", "checked", "floral"),
        ANYONE,
        65,
    ),
    "boot": Kind(
        ("boots", "ankle boots", "pull-on boots"),
        WORN,
        ("leather", "suede", "rubber"),
        ("plain",),
        ANYONE,
        99,
    ),
    "handbag": Kind(
        ("handbag", "top handle bag", "purse"),
        CARRIED,
        ("leather", "canvas"),
        ("plain", "checked", "floral"),
        ("women",),
        75,
    ),
    "backpack": Kind(
        ("backpack", "rucksack", "daypack"),
        CARRIED,
        ("canvas", "nylon", "cotton"),
        ("plain", "polka dot", "floral"),
        ANYONE,
        48,
    ),
    "watch": Kind(
        ("watch", "wrist watch", "analogue watch"),
        CARRIED,
        ("leather", "steel"),
        ("plain",),
        ADULTS,
        110,
    ),
    "sunglasses": Kind(
        ("sunglasses", "shades", "square sunglasses"),
        CARRIED,
        ("acetate", "recycled plastic"),
        ("plain", "polka dot"),
        ADULTS,
        30,
    ),
    "mug": Kind(
        ("mug", "coffee mug", "tea mug", "cup"),
        HOUSED,
        ("ceramic", "stoneware", "porcelain"),
        ALL,
        ("",),
        12,
    ),
    "umbrella": Kind(
        ("umbrella", "walking umbrella", "brolly"), CARRIED, ("nylon", "polyester"), ALL, ("",), 24
    ),
    "lamp": Kind(
        ("table lamp", "bedside lamp", "desk lamp"),
        HOUSED,
        ("linen", "cotton"),
        ("plain", "striped", "floral"),
        ("",),
        46,
    ),
    "cushion": Kind(
        ("cushion", "throw pillow", "scatter cushion"),
        HOUSED,
        ("cotton", "velvet", "linen"),
        ALL,
        ("",),
        19,
    ),
    "chair": Kind(
        ("armchair", "accent chair", "upholstered chair"),
        HOUSED,
        ("velvet", "linen", "wool"),
        ("plain", "striped", "checked", "floral"),
        ("",),
        240,
    ),
}
# One template, one seller's habit; commas part segments, and an empty segment is left out.
TEMPLATES = (
    "{brand} {who} {extra} {colour} {pattern} {material} {name}",
    "{who} {pattern} {name} in {colour}, {material}, {brand}",
    "{brand} {extra} {material} {name}, {pattern} {colour}",
    "{colour} {pattern} {name} by {brand}",
    "{extra} {colour} {pattern} {material} {name} | {brand}",
    "{brand} {name} {who}, {material}, {pattern}, {colour}",
)
COLOURLESS = (
    "{brand} {who} {extra} {pattern} {material} {name}",
    "{who} {pattern} {name}, {material}, {brand}",
    "{extra} {pattern} {material} {name} by {brand}",
    "{brand} {name}, {pattern}, {extra}",
)


@dataclass(frozen=True)
class Product:
    """One row of products.parquet."""

    id: str
    title: str
    kind: str
    colour: str
    pattern: str
    material: str
    audience: str
    price: float
    colour_in_title: bool


@dataclass(frozen=True)
class Query:
    """What a shopper types, and the attributes it names."""

    text: str
    kind: str
    colour: str = ""
    pattern: str = ""
    audience: str = ""

    def named(self) -> dict[str, str]:
        """The attributes named beside the kind."""
        attributes = {"colour": self.colour, "pattern": self.pattern, "audience": self.audience}
        return {name: value for name, value in attributes.items() if value}


QUERIES = (
    Query("navy blue striped shirt", "shirt", "navy blue", "striped"),
    Query("red mug", "mug", "red"),
    Query("women's black boots", "boot", "black", audience="women"),
    Query("pink floral dress", "dress", "pink", "floral"),
    Query("mustard yellow backpack", "backpack", "mustard yellow"),
    Query("teal armchair", "chair", "teal"),
    Query("white trainers", "sneaker", "white"),
    Query("checked red scarf", "scarf", "red", "checked"),
    Query("polka dot umbrella", "umbrella", pattern="polka dot"),
    Query("men's olive green jacket", "jacket", "olive green", audience="men"),
    Query("brown handbag", "handbag", "brown"),
    Query("grey hoodie", "hoodie", "grey"),
    Query("striped socks", "socks", pattern="striped"),
    Query("purple cushion", "cushion", "purple"),
    Query("black sunglasses", "sunglasses", "black"),
    Query("orange baseball cap", "cap", "orange"),
    Query("beige trousers", "trousers", "beige"),
    Query("burgundy plaid skirt", "skirt", "burgundy", "checked"),
    Query("forest green jumper", "sweater", "forest green"),
    Query("white striped tee", "t-shirt", "white", "striped"),
    Query("floral table lamp", "lamp", pattern="floral"),
    Query("brown wrist watch", "watch", "brown"),
    Query("sky blue gingham shirt", "shirt", "sky blue", "checked"),
    Query("black dress with polka dots", "dress", "black", "polka dot"),
)


def catalog_queries(products: int) -> tuple[Query, ...]:
    """The queries a catalog of that many products can answer."""
    return QUERIES[: products // (STOCK + 1)]


def catalog_products(products: int, seed: int) -> list[Product]:
    """The catalog's rows: some stocked for each query, the rest a bit of everything."""
    if products < MIN_PRODUCTS:
        raise ValueError(f"a catalog needs at least {MIN_PRODUCTS} products, not {products}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, it is {seed}")
    plans = [
        {"kind": query.kind} | query.named()
        for query in catalog_queries(products)
        for _ in range(max(STOCK, products // 80))
    ]
    kinds = list(KINDS)
    plans += [{"kind": kinds[i % len(kinds)]} for i in range(products - len(plans))]
    order = np.random.default_rng(seed).permutation(products)
    return [
        _product(row, plans[place], np.random.default_rng([seed, row]))
        for row, place in enumerate(order)
    ]


def relevance(query: Query, product: Product) -> int:
    """2 where the product has all that the query names, 1 for the kind and some of it, else 0."""
    if product.kind != query.kind:
        return 0
    agree = [getattr(product, name) == value for name, value in query.named().items()]
    return 2 if all(agree) else int(any(agree))


def _product(row: int, plan: dict[str, str], rng: np.random.Generator) -> Product:
    """Make up one product; what the plan leaves open is drawn at random."""
    kind = KINDS[plan["kind"]]
    odds = np.array([1.0 + 2 * (name == "plain") for name in kind.patterns])
    pattern = str(rng.choice(kind.patterns, p=odds / odds.sum()))
    chosen = {
        "colour": _pick(rng, tuple(COLOURS)),
        "pattern": pattern,
        "audience": _pick(rng, kind.audiences),
    } | plan
    material = _pick(rng, kind.materials)
    price = max(2, round(kind.price * float(np.exp(rng.normal(0, 0.3))))) - 0.05
    named = bool(rng.random() < 0.65)
    words = {
        "brand": _pick(rng, BRANDS),
        "name": _pick(rng, kind.names),
        "extra": _pick(rng, kind.extras),
        "material": material if rng.random() < 0.7 else "",
        "who": AUDIENCE_WORDS.get(chosen["audience"], "") if rng.random() < 0.8 else "",
        "colour": _pick(rng, COLOUR_WORDS[chosen["colour"]]),
        "pattern": "",
    }
    if chosen["pattern"] != "plain" and rng.random() < 0.6:
        words["pattern"] = _pick(rng, PATTERN_WORDS[chosen["pattern"]])
    title = _title(_pick(rng, TEMPLATES if named else COLOURLESS), words, rng.random() < 0.6)
    return Product(
        id=f"p{row + 1:05d}",
        title=title,
        material=material,
        price=round(price, 2),
        colour_in_title=named,
        **chosen,
    )


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """One of the choices."""
    return choices[int(rng.integers(len(choices)))]


def _title(template: str, words: dict[str, str], capitals: bool) -> str:
    """Fill in a template, leave out its empty segments, and set its capital letters."""
    segments = (" ".join(part.split()) for part in template.format(**words).split(","))
    title = ", ".join(segment for segment in segments if segment)
    if capitals:
        small = ("in", "by", "of")
        return " ".join(w if w in small else w[0].upper() + w[1:] for w in title.split())
    return title[0].upper() + title[1:]
