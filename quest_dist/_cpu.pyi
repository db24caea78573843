"""The compiled ops; see kernels/bind.cpp. Addresses are `Tensor.data_ptr()`."""

class Pages:
    def __init__(
        self,
        kv: int,
        meta: int,
        page_table: int,
        dtype: int,
        pages: int,
        kv_heads: int,
        page_size: int,
        dim: int,
        rows: int,
        row_pages: int,
    ) -> None: ...

class ByteMeta:
    def __init__(self, values: int, scale: int, offset: int) -> None: ...

class Strided:
    def __init__(self, data: int, row: int, head: int, token: int) -> None: ...

class Selection:
    def __init__(self, index: int, count: int, lists: int, width: int, unit: int) -> None: ...

class Int4:
    def __init__(self, data: int, outputs: int, inputs: int, group: int) -> None: ...

class Nuq:
    def __init__(
        self,
        keys: int,
        values: int,
        starts: int,
        outliers: int,
        cos: int,
        sin: int,
        outlier_count: int,
        positions: int,
        sinks: int,
    ) -> None: ...

class Packed:
    def __init__(
        self,
        data: int,
        table: int,
        keys: int,
        values: int,
        levels: int,
        blocks: int,
        row_blocks: int,
        bits: int,
        group: int,
        nuq: Nuq,
    ) -> None: ...

def pack(pages: Pages, packed: Packed, keys: int, values: int, threads: int) -> None: ...
def attend_packed(
    pages: Pages,
    packed: Packed,
    q: int,
    heads: int,
    lengths: int,
    selection: Selection,
    scale: float,
    out: int,
    attended: int,
    read: int,
    lse: int,
    threads: int,
) -> None: ...
def append(
    pages: Pages, k: Strided, v: Strided, starts: int, tokens: int, threads: int
) -> None: ...
def page_scores(
    pages: Pages,
    codes: ByteMeta,
    q: int,
    heads: int,
    lengths: int,
    radius_scale: float,
    reduce: int,
    score_open: bool,
    out: int,
    threads: int,
) -> None: ...
def select_top(
    scores: int,
    items: int,
    keep: int,
    rows: int,
    lists: int,
    items_max: int,
    force_last: bool,
    index: int,
    width: int,
    count: int,
    threads: int,
) -> None: ...
def listed_tokens(pages: Pages, lengths: int, selection: Selection) -> int: ...
def attend(
    pages: Pages,
    q: int,
    rolled_query: int,
    rolled: int,
    heads: int,
    lengths: int,
    selection: Selection,
    scale: float,
    out: int,
    attended: int,
    read: int,
    lse: int,
    probabilities: int,
    probability_width: int,
    threads: int,
) -> None: ...
def token_scores(
    pages: Pages,
    q: int,
    heads: int,
    lengths: int,
    scale: float,
    out: int,
    width: int,
    threads: int,
) -> None: ...
def gather(pages: Pages, length: int, k: int, v: int, threads: int) -> None: ...
def prefill_attend(
    q: Strided,
    k: Strided,
    v: Strided,
    rows: int,
    heads: int,
    kv_heads: int,
    queries: int,
    length: int,
    dim: int,
    scale: float,
    out: int,
    workspace: int,
    threads: int,
) -> None: ...
def prefill_workspace(rows: int, kv_heads: int, length: int, dim: int) -> int: ...
def has_prefill() -> bool: ...
def linear4(weights: Int4, x: int, dtype: int, rows: int, out: int, threads: int) -> None: ...
def widen4(weights: Int4, first: int, count: int, dtype: int, out: int, threads: int) -> None: ...
def isa() -> str: ...
def isas() -> str: ...
def set_isa(name: str) -> None: ...
def prefer_huge_pages(data: int, bytes: int) -> None: ...
