"""The compiled ops on a GPU; see kernels/bind_cuda.cpp. Addresses are `Tensor.data_ptr()`."""

LARGEST_DIM: int
NO_FAULT: int

class Launch:
    def __init__(self, device: int, stream: int, fault: int) -> None: ...

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

class Strided:
    def __init__(self, data: int, row: int, head: int, token: int) -> None: ...

class Angles:
    def __init__(self, cos: int, sin: int, cos_row: int, sin_row: int, wide: bool) -> None: ...

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

class Selection:
    def __init__(self, index: int, count: int, lists: int, width: int, unit: int) -> None: ...

class Int4:
    def __init__(self, data: int, outputs: int, inputs: int, group: int) -> None: ...

def append(
    launch: Launch, pages: Pages, k: Strided, v: Strided, starts: int, tokens: int
) -> None: ...
def page_scores(
    launch: Launch,
    pages: Pages,
    q: int,
    heads: int,
    lengths: int,
    radius_scale: float,
    reduce: int,
    score_open: bool,
    out: int,
) -> None: ...
def select_top(
    launch: Launch,
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
) -> None: ...
def pack(launch: Launch, pages: Pages, packed: Packed, keys: int, values: int) -> None: ...
def attend_packed(
    launch: Launch,
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
    counters: int,
    workspace: int,
) -> None: ...
def attend_workspace_bytes(rows: int, heads: int, dim: int) -> int: ...
def attend(
    launch: Launch,
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
    counters: int,
    workspace: int,
) -> None: ...
def decode_workspace_bytes(pages: Pages, heads: int, reduce: int) -> int: ...
def decode(
    launch: Launch,
    pages: Pages,
    q: Strided,
    k: Strided,
    v: Strided,
    angles: Angles,
    heads: int,
    lengths: int,
    keep: int,
    radius_scale: float,
    reduce: int,
    scale: float,
    out: int,
    attended: int,
    read: int,
    lse: int,
    counters: int,
    workspace: int,
) -> None: ...
def check_lists(launch: Launch, pages: Pages, lengths: int, selection: Selection) -> None: ...
def token_scores(
    launch: Launch,
    pages: Pages,
    q: int,
    heads: int,
    lengths: int,
    scale: float,
    out: int,
    width: int,
) -> None: ...
def gather(launch: Launch, pages: Pages, length: int, k: int, v: int) -> None: ...
def linear4(launch: Launch, weights: Int4, x: int, dtype: int, rows: int, out: int) -> None: ...
def widen4(launch: Launch, weights: Int4, first: int, count: int, dtype: int, out: int) -> None: ...
def device_count() -> int: ...
def capture_id(stream: int) -> int: ...
def warm_up(device: int) -> None: ...
