"""Speculation: tokens that one pass of the target gives when a draft guesses a tree of them.

It goes on with PG-19's books, greedily, plainly and by speculation (see `quest_dist.speculation`).
The text is the same by construction, which every sample checks; how fast it comes is the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quest_dist.tasks.pg19 import PG19
from quest_dist.tasks.prompt import Language
from quest_dist.tasks.sources import Source
from quest_dist.tasks.task import Cost, Outcome, Sample, Speed
from quest_dist.token_tree import most_nodes

if TYPE_CHECKING:
    from quest_dist.plan import Point

VERSION = 1
"""Raised when a change here changes any score."""
DRAFTS = ("early_exit", "model", "lookup")
MOST_NODES = 128
#: For estimates: bytes of a number, and tokens that a node's own pages have room for.
FLOAT32, BLOCK = 4, 32


class Speculation(PG19):
    """Accepted tokens a pass of the target; 1 is plain decoding.

    `draft` early_exit (`exit_layers` of the target), model (`draft_model`, settings as those of a
    model) or lookup; trees of `size` nodes on at most `depth` levels, the newest token's included,
    with at most `branches` guesses after a token; `calibration` tokens estimate acceptance.
    """

    metric = "tokens_per_pass"
    evaluated_by: ClassVar[str] = "quest_dist.speculation:evaluate"
    needs_float32: ClassVar[bool] = True
    x: ClassVar[str] = ""

    def __init__(
        self,
        *,
        data: Source,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int = 10,
        prefill: int = 2048,
        max_new_tokens: int = 64,
        draft: str = "early_exit",
        exit_layers: int = 24,
        draft_model: Mapping[str, Any] | None = None,
        size: int = 8,
        depth: int = 4,
        branches: int = 4,
        calibration: int = 256,
    ) -> None:
        """Check the settings; books are read from `data` at first need."""
        super().__init__(
            data=data,
            protocol=protocol,
            samples=samples,
            prefill=prefill,
            tokens=max_new_tokens,
        )
        if draft not in DRAFTS:
            raise ValueError(f"task.draft={draft!r}: choose one of {', '.join(DRAFTS)}")
        if (draft == "model") != (draft_model is not None):
            raise ValueError(
                f"task.draft={draft} with draft_model={draft_model}: draft=model needs one, given"
                " as the settings of a model (source, repo, dtype), and no other draft takes it"
            )
        for name, value, low in (
            ("prefill", prefill, 2),
            ("max_new_tokens", max_new_tokens, 2),
            ("exit_layers", exit_layers, 1),
            ("depth", depth, 1),
            ("branches", branches, 1),
            ("calibration", calibration, 1),
        ):
            if value < low:
                raise ValueError(f"task.{name}={value} is below {low}")
        most = min(MOST_NODES, most_nodes(branches, depth))
        if not 1 <= size <= most:
            raise ValueError(
                f"task.size={size}: choose 1 to {most} nodes for depth={depth} and"
                f" branches={branches}"
            )
        self.max_new_tokens, self.draft, self.draft_model = max_new_tokens, draft, draft_model
        self.how = {"exit_layers": exit_layers, "size": size, "depth": depth}
        self.how |= {"branches": branches, "calibration": calibration}

    def identity(self) -> dict[str, Any]:
        """Return what the books are, and the version of the measure."""
        return {**super().identity(), "measure": "speculation", "measured": VERSION}

    def needs(self) -> int:
        """Return the tokens of a sample, those of a last pass that go too far included."""
        return self.prefill + 1 + self.max_new_tokens + self.how["depth"]

    def check_method(self, method: Any) -> None:
        """Raise ValueError for a method whose rows cannot branch."""
        if not method.stateless():
            raise ValueError(
                "it keeps state from step to step, so the rows of a token tree cannot branch and"
                " be taken back; choose full, quest or tightbound (metadata=exact), streaming or"
                " an oracle"
            )

    def check_model(self, shape: Mapping[str, Any]) -> None:
        """Raise ValueError for an early exit beyond the model's layers."""
        layers, asked = int(shape["layers"]), self.how["exit_layers"]
        if self.draft == "early_exit" and asked > layers:
            raise ValueError(f"task.exit_layers={asked}: choose 1 to {layers}, the model's layers")

    def other_models(self) -> dict[str, Mapping[str, Any]]:
        """Return the draft's model, where it is one."""
        return {} if self.draft_model is None else {"draft_model": self.draft_model}

    @staticmethod
    def cost(points: Sequence[Point], shape: Mapping[str, Any], speed: Speed) -> Cost:
        """Return what a sample costs if no guess is right: a plain step, a pass and the draft's
        levels for every token."""
        how = points[0].task.settings
        context, new, size = (int(how[name]) for name in ("prefill", "max_new_tokens", "size"))
        parameters, layers = int(shape["parameters"]), int(shape["layers"])
        token = 2 * FLOAT32 * layers * int(shape["kv_heads"]) * int(shape["head_dim"])
        drafted = 0.0
        if how["draft"] != "lookup":
            drafted = (int(how["depth"]) - 1) * min(1.0, int(how["exit_layers"]) / layers)
        steps = 2 + drafted
        seconds = 2 * parameters * context / speed.flops
        for point in points:
            cache = token * min(context, point.budget or context)
            moved = steps * FLOAT32 * parameters + (steps + size) * cache
            seconds += new * (moved / speed.bytes + 2 * parameters * size / speed.flops)
        return Cost(seconds, FLOAT32 * parameters + token * (context + new + 2 * size * BLOCK))

    def sample(self, index: int, language: Language) -> Sample:
        """Return the beginning of segment `index`, to be continued."""
        sample = super().sample(index, language)
        how = {"draft": self.draft, "draft_model": self.draft_model, **self.how}
        return replace(
            sample,
            tail=sample.tail[:1],
            max_new_tokens=self.max_new_tokens,
            score_tail=False,
            info={**sample.info, **how},
        )

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return accepted tokens a pass; ArithmeticError where a token is not plain decoding's."""
        if outcome.facts["lossless"] != 1:
            raise ArithmeticError(
                "speculation is not lossless here: its tokens differ from plain greedy decoding's"
            )
        return float(outcome.facts["tokens_per_pass"])

    def curve(self, sample: Sample, outcome: Outcome) -> tuple[tuple[float, float], ...]:
        """Return nothing: there is no curve."""
        return ()
