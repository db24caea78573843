"""Speculation gives plain decoding's tokens whatever the draft guesses, and as fast as it guesses
well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_harness import METHODS, method_spec
from test_engine import TOKENS, point, sample
from tiny_models import save_byte_model, tiny, tiny_loaded

from quest_dist import compose, drafts, engine, models, speculation
from quest_dist.attention import PagedCache, patch
from quest_dist.batch import Batch, Group
from quest_dist.drafts import Fresh
from quest_dist.models import LoadedModel
from quest_dist.plan import Point
from quest_dist.pool import Rows
from quest_dist.prepare import prepare
from quest_dist.tasks.generated import Generated
from quest_dist.tasks.speculation import Speculation
from quest_dist.tasks.task import Outcome, Sample
from quest_dist.token_tree import Tree, best_shape, grow

STATELESS = [name for name in METHODS if method_spec(name).build().stateless()]
HOW = {
    "draft": "early_exit",
    "draft_model": None,
    "exit_layers": 3,
    "size": 7,
    "depth": 4,
    "branches": 3,
    "calibration": 20,
}
#: A text that repeats itself, so that a lookup finds something.
SAMPLE = sample(
    context=tuple(TOKENS[:24] * 3)[:60], tail=tuple(TOKENS[:2]), max_new_tokens=24, info=HOW
)
GRID = [point(name, None if name == "full" else 9) for name in STATELESS]


def changed(**how: object) -> Sample:
    return replace(SAMPLE, info={**HOW, **how})


def plain(loaded: LoadedModel, points: Sequence[Point]) -> list[tuple[int, ...]]:
    return [engine.evaluate(loaded, SAMPLE, [p])[0].outcome.token_ids for p in points]


def test_methods_that_keep_state_are_told_from_those_that_do_not() -> None:
    assert {"full", "quest", "tightbound", "streaming", "oracle_token", "oracle_page"} <= {
        *STATELESS
    }
    assert not {"h2o", "tova"} & {*STATELESS}
    assert not method_spec("quest", metadata="int8").build().stateless()


@pytest.mark.parametrize("kind", ["early_exit", "lookup"])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_tokens_are_plain_decodings_under_every_method(kind: str, size: int, place: str) -> None:
    loaded = tiny_loaded(device=place)
    found = speculation.evaluate(loaded, changed(draft=kind, size=size), GRID)
    assert [result.outcome.token_ids for result in found] == plain(loaded, GRID)
    assert len({result.outcome.token_ids for result in found}) > 3
    for result in found:
        facts = result.outcome.facts
        assert facts["lossless"] == 1
        assert facts["tokens_per_pass"] >= 1
        assert facts["nodes"] <= size
        assert result.planned_low - 1e-6 <= result.attended <= result.planned_high + 1e-6
        if size == 1:
            assert (facts["tokens_per_pass"], facts["cache_ratio"]) == (
                1,
                pytest.approx(1, abs=0.03),
            )
            assert facts["passes"] == SAMPLE.max_new_tokens - 1


class Scripted:
    """A draft that knows the answer and gives it at one rank, or never."""

    def __init__(self, truth: Sequence[int], rank: int | None) -> None:
        self.truth, self.rank = list(truth), rank
        self.next = 0

    def begin(self, rows: Rows, text: Sequence[int], asked: int, most: int) -> list[list[int]]:
        raise NotImplementedError

    def again(self, fresh: Fresh) -> None:
        pass

    def start(self, rows: Rows, text: Sequence[int]) -> None:
        assert rows.lengths_list == [len(text) - 1]
        self.next = len(text) - len(SAMPLE.context) - len(SAMPLE.tail)

    def guess(self, parents: Sequence[int], tokens: Sequence[int], most: int) -> list[list[int]]:
        right = (self.truth[self.next :] or [0])[0]
        self.next += 1
        wrong = [token for token in range(97) if token != right][:most]
        if self.rank is not None:
            wrong.insert(self.rank, right)
        return [wrong[:most]] * len(tokens)

    def stop(self) -> None:
        pass


class Random(Scripted):
    """A draft that knows nothing; now and then it is right, anywhere in the tree."""

    def __init__(self, truth: Sequence[int], seed: int) -> None:
        super().__init__(truth, None)
        self.draw = torch.Generator().manual_seed(seed)

    def guess(self, parents: Sequence[int], tokens: Sequence[int], most: int) -> list[list[int]]:
        rank = int(torch.randint(0, most + 1, (), generator=self.draw))
        self.rank = None if rank == most else rank
        return super().guess(parents, tokens, most)


def speculated(made: Point, draft: Scripted, shape: Tree, page_size: int = 4) -> speculation.Spoken:
    """The tokens of a point on the tiny model; all pages but the context's are given back."""
    loaded = tiny_loaded()

    def fresh(rows: int) -> Group:
        return Group(made.method.build(), [made.budget or 0] * rows, made.dense_layers)

    with torch.inference_mode(), patch(loaded.model, lambda rows: [], page_size) as patched:
        prefix = engine.prefill(loaded, patched, SAMPLE, (), 1)
        held = prefix.pool.pages - prefix.pool.free_pages
        how = (SAMPLE, fresh, draft, shape)
        spoken = speculation.speculate(loaded, patched.rotate, prefix.rows, *how)
        assert prefix.pool.pages - prefix.pool.free_pages == held == -(-60 // page_size)
    return spoken


@pytest.mark.parametrize("name", ["full", "quest"])
def test_a_draft_that_is_always_wrong_gives_one_token_a_pass(name: str) -> None:
    made = point(name, None if name == "full" else 9)
    [truth] = plain(tiny_loaded(), [made])
    spoken = speculated(made, Scripted(truth, None), best_shape([0.5, 0.4], 9, 4))
    assert (tuple(spoken.tokens), set(spoken.given)) == (truth, {1})
    assert spoken.hits == [0, 0]
    assert min(spoken.chances) > 0


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_draft_that_is_always_right_gives_the_trees_depth(rank: int) -> None:
    made = point("quest", 9)
    [truth] = plain(tiny_loaded(), [made])
    shape, right = Tree(), -1
    for level in range(5):  # three guesses after each right one, and the root
        added = [shape.add(-1, right, r) for r in range(3 if level else 1)]
        right = added[rank if level else 0]
    spoken = speculated(made, Scripted(truth, rank), shape)
    assert tuple(spoken.tokens) == truth
    assert set(spoken.given[:-1]) == {5}  # past the answer the script has nothing right
    assert spoken.hits[rank] == sum(spoken.hits) >= 4 * (len(spoken.given) - 1)


def test_the_target_as_its_own_draft_is_accepted_to_the_last_level() -> None:
    loaded = tiny_loaded()
    for made in GRID:
        how = changed(exit_layers=4, size=5, depth=5, branches=1)
        [found] = speculation.evaluate(loaded, how, [made])
        assert found.outcome.facts["tokens_per_pass"] == 5
        assert found.outcome.facts["accepted_1"] == 1


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("name", STATELESS)
def test_a_draft_that_guesses_at_random_changes_nothing(name: str, page_size: int) -> None:
    made = replace(point(name, None if name == "full" else 17), page_size=page_size)
    [truth] = plain(tiny_loaded(), [made])
    found = []
    for seed in range(4):
        shape = best_shape([0.3, 0.25, 0.2], 13, 4)
        spoken = speculated(made, Random(truth, seed), shape, page_size)
        assert tuple(spoken.tokens) == truth
        found.append(tuple(spoken.given))
    assert len({*found}) > 1
    assert max(map(max, found)) > 1


@pytest.mark.parametrize("name", STATELESS)
def test_every_node_attends_as_the_decode_step_of_its_path(name: str) -> None:
    """Keys, metadata and logits of a node's row are those of a row that decoded its path."""
    loaded, budget = tiny_loaded(), 0 if name == "full" else 13

    def fresh(rows: int) -> Group:
        return Group(method_spec(name).build(), [budget] * rows, 1)

    shape = best_shape([0.5, 0.3], 11, 5)
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 97, (len(shape),), generator=draw).tolist()
    tree = Tree(tokens, shape.parents, shape.ranks, shape.depths)
    with torch.inference_mode(), patch(loaded.model, lambda rows: [], 4) as patched:
        prefix = engine.prefill(loaded, patched, SAMPLE, (), 20)
        batch = speculation.Branches(prefix.rows, tree, fresh, patched.rotate)
        at = [60 + depth - 1 for depth in tree.depths]
        logits = engine.read(loaded, PagedCache(batch), [[t] for t in tokens], at)
        for node in range(len(tree)):
            alone = Batch(prefix.rows.fork(0, 1), [fresh(1)], patched.rotate)
            for step, place in enumerate(tree.path(node)):
                expected = engine.read(loaded, PagedCache(alone), [[tokens[place]]], [60 + step])
            torch.testing.assert_close(logits[node], expected[0], rtol=1e-4, atol=1e-4)
            for layer in range(4):
                found = batch.rows.gather(layer, node)
                for mine, wanted in zip(found, alone.rows.gather(layer, 0), strict=True):
                    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
            mine, wanted = batch.measured[node], alone.measured[0]
            assert mine.planned_low <= mine.attended <= mine.planned_high
            assert wanted.steps == tree.depths[node]


def test_every_guess_is_the_drafts_for_the_path_to_its_node() -> None:
    """All layers of the target guess what it will choose, in every branch."""
    loaded, shape = tiny_loaded(), best_shape([0.5, 0.4], 13, 4)

    def fresh(rows: int) -> Group:
        return Group(method_spec("quest").build(), [13] * rows, 1)

    with torch.inference_mode(), patch(loaded.model, lambda rows: [], 4) as patched:
        prefix = engine.prefill(loaded, patched, SAMPLE, (), 20)
        draft = drafts.EarlyExit(loaded, patched, 4)
        draft.again(fresh)
        draft.start(prefix.rows, [*SAMPLE.context, 5])
        tree = grow(shape, 5, draft.guess)
        draft.stop()
        batch = speculation.Branches(prefix.rows, tree, fresh, patched.rotate)
        at = [60 + depth - 1 for depth in tree.depths]
        logits = engine.read(loaded, PagedCache(batch), [[t] for t in tree.tokens], at)
    branching = 0
    for node, children in enumerate(tree.children()):
        best = logits[node, -1].topk(len(children)).indices.tolist()
        assert [tree.tokens[child] for child in children] == best
        branching += bool(children) and tree.ranks[node] > 0
    assert branching > 1


def test_acceptance_is_counted_by_rank_and_never_zero() -> None:
    guesses = [[1, 2], [3, 4], [5, 6], [7]]
    assert speculation.acceptance(guesses, [1, 4, 6, 9], 2) == [2 / 7, 3 / 7]
    assert sum(speculation.acceptance(guesses, [1, 3, 5, 7], 2)) < 1


def test_the_first_layers_are_the_target_cut_short(place: str) -> None:
    loaded = tiny_loaded(device=place)
    ids = torch.tensor([TOKENS[:30]], device=place)
    with torch.inference_mode():
        whole = loaded.model(ids).logits
        hidden = loaded.model(ids, output_hidden_states=True).hidden_states[2]
        with drafts.first_layers(loaded.model, 2):
            short = loaded.model(ids).logits
        again = loaded.model(ids).logits
        expected = loaded.model.lm_head(loaded.model.model.norm(hidden))
    assert torch.equal(whole, again)
    torch.testing.assert_close(short, expected)


def test_a_lookup_finds_what_followed_the_longest_ending_the_latest_first() -> None:
    draft = drafts.Lookup()
    rows: Rows = None  # type: ignore[assignment]
    text = [1, 2, 3, 4, 1, 2, 3, 5, 9, 3, 6, 1, 2, 3]
    assert draft.begin(rows, text, 2, 4) == [[3], [5, 4, 6]]
    draft.again(drafts.dense)
    draft.start(rows, text)
    assert draft.guess([0], [3], 2) == [[5, 4]]
    assert draft.guess([0, 0], [5, 4], 2) == [[9], [1]]
    draft.stop()
    draft.start(rows, [*text, 4, 7])
    assert draft.guess([0], [7], 3) == [[]]
    draft.start(rows, [*text, 4, 7, 1, 2, 3])
    assert draft.guess([0], [3], 1) == [[4]]
    draft.again(drafts.dense)
    draft.start(rows, text)
    assert draft.guess([0], [3], 1) == [[5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads bytes, as any local one."""
    made = tmp_path_factory.mktemp("target")
    save_byte_model(made)
    return made


def test_another_model_drafts_from_a_cache_of_its_own(folder: Path) -> None:
    settings = {"source": "local", "path": str(folder), "dtype": "float32"}
    loaded = models.load(settings)
    points = [point("full"), point("quest", 9)]
    asked = changed(draft="model", draft_model=settings, size=4, depth=4, branches=1)
    same, sparse = speculation.evaluate(loaded, asked, points)
    # Dense like its target, it is never wrong; of a sparse target it can be.
    assert same.outcome.facts["tokens_per_pass"] == 4
    assert sparse.outcome.facts["tokens_per_pass"] <= 4
    endless = replace(loaded, language=replace(loaded.language, eos_ids=frozenset()))
    for made, result in zip(points, (same, sparse), strict=True):
        expected = engine.evaluate(endless, SAMPLE, [made])[0].outcome.token_ids
        assert result.outcome.token_ids == expected
        assert result.outcome.facts["lossless"] == 1


def test_a_draft_of_another_vocabulary_is_refused(folder: Path) -> None:
    settings = {"source": "local", "path": str(folder), "dtype": "float32"}
    with pytest.raises(ValueError, match=r"draft_model=.*its vocabulary differs from the target's"):
        speculation.evaluate(tiny_loaded(), changed(draft="model", draft_model=settings), GRID)


def test_layers_that_the_target_has_not_are_refused_by_the_evaluation_too() -> None:
    with pytest.raises(ValueError, match="exit_layers=5: the model has layers 1 to 4"):
        speculation.evaluate(tiny_loaded(), changed(exit_layers=5), GRID)


def test_a_sample_that_would_outgrow_the_model_is_refused() -> None:
    long = replace(changed(), context=tuple(TOKENS[:1] * 484))
    with pytest.raises(ValueError, match="510 tokens with its answer, the model takes 508"):
        speculation.evaluate(tiny_loaded(), long, GRID)


def task(**settings: object) -> Speculation:
    return Speculation(data=Generated(), **settings)  # type: ignore[arg-type]


def test_the_score_is_tokens_a_pass_and_no_score_where_a_token_is_lost() -> None:
    facts = {"tokens_per_pass": 1.75, "lossless": 1.0}
    assert task().score(SAMPLE, Outcome("", facts=facts)) == 1.75
    with pytest.raises(ArithmeticError, match="speculation is not lossless here"):
        task().score(SAMPLE, Outcome("", facts={**facts, "lossless": 0.0}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draft": "oracle"}, "task.draft='oracle': choose one of early_exit, model, lookup"),
        ({"draft": "model"}, "task.draft=model with draft_model=None: draft=model needs one"),
        ({"size": 0}, "task.size=0: choose 1 to 85 nodes for depth=4 and branches=4"),
        ({"size": 6, "branches": 1}, "task.size=6: choose 1 to 4 nodes for depth=4 and branches=1"),
        ({"depth": 0}, "task.depth=0 is below 1"),
        ({"max_new_tokens": 1}, "task.max_new_tokens=1 is below 2"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        task(**settings)


RUN = ["grid.model=[smollm2]", "grid.task=[speculation]", "grid.method=[full]"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], r"^task speculation: model\.smollm2\.dtype=bfloat16: rounding .* choose float32"),
        (
            ["model.smollm2.dtype=float32", "task.speculation.exit_layers=31"],
            r"^task speculation: task\.exit_layers=31: choose 1 to 30, .*\(model\.smollm2\)",
        ),
        (
            ["model.smollm2.dtype=float32", "grid.method=[h2o]", "grid.budget=[256]"],
            r"^method h2o: it keeps state from step to step, .* choose full, quest",
        ),
        (
            ["task.speculation.draft=model", "+task.speculation.draft_model.source=lokal"],
            r"^task speculation: draft_model\.source='lokal'",
        ),
    ],
)
def test_what_cannot_be_run_is_said_before_a_worker_starts(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare(compose.composed([*RUN, *overrides]))


def test_the_drafts_model_is_in_the_points_key_by_content(folder: Path, tmp_path: Path) -> None:
    copied, other = tmp_path / "copied", tmp_path / "other"
    for name in (copied, other):
        save_byte_model(name)
    tiny(vocab_size=257, num_hidden_layers=2).save_pretrained(other)

    def key(path: Path) -> str:
        draft = f"{{source: local, path: {path}, dtype: float32}}"
        named = [f"task.speculation.draft_model={draft}", "task.speculation.draft=model"]
        [found] = prepare(compose.composed([*RUN, "model.smollm2.dtype=float32", *named])).points
        return found.key

    assert key(folder) == key(copied)
    assert key(folder) != key(other)
