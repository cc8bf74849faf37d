"""Search for a topology by policy gradients: rewards are changes of the two scores (paper, section 3.2)."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from convatlas.errors import unknown
from convatlas.networks.as_vit import Genotype

__all__ = ["Policy", "Rewards", "ScoreName", "TopologySpace"]

#: Condition of the neural tangent kernel, and length distortion.
ScoreName = Literal["ntk", "length"]


@dataclass(frozen=True)
class TopologySpace:
    """The choices for each of 12 decisions, in the order in which a policy makes them.

    Attributes:
        kernel1, kernel2, kernel3, kernel4: K of each stage.
        split1, split2, split3: S of the first three stages; that of the last is 1.
        expansion1, expansion2, expansion3, expansion4: E of each stage.
        heads: HEAD.
    """

    kernel1: tuple[int, ...] = (4, 5, 6, 7, 8)
    kernel2: tuple[int, ...] = (2, 3, 4)
    kernel3: tuple[int, ...] = (2, 3, 4)
    kernel4: tuple[int, ...] = (2, 3, 4)
    split1: tuple[int, ...] = (2, 4, 8)
    split2: tuple[int, ...] = (1, 2, 4)
    split3: tuple[int, ...] = (1, 2)
    expansion1: tuple[int, ...] = (2, 3, 4, 5, 6)
    expansion2: tuple[int, ...] = (2, 3, 4, 5, 6)
    expansion3: tuple[int, ...] = (2, 3, 4, 5, 6)
    expansion4: tuple[int, ...] = (2, 3, 4, 5, 6)
    heads: tuple[int, ...] = (16, 32, 64)

    @property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """The options of each decision."""
        return tuple(getattr(self, entry.name) for entry in fields(self))

    @property
    def size(self) -> int:
        """Number of topologies."""
        return math.prod(map(len, self.choices))

    def genotype(self, actions: Sequence[int], *, hidden: int = 32) -> Genotype:
        """The topology that a vector of 12 indices chooses.

        Raises:
            ValueError: there are not 12 of them, or one is out of range.
        """
        if len(actions) != len(self.choices):
            raise ValueError(f"actions must be {len(self.choices)} indices, got {len(actions)}")
        chosen = []
        for entry, options, action in zip(fields(self), self.choices, actions, strict=True):
            if not 0 <= action < len(options):
                raise ValueError(f"the action for {entry.name} must be below {len(options)}, got {action}")
            chosen.append(options[action])
        k1, k2, k3, k4, s1, s2, s3, e1, e2, e3, e4, heads = chosen
        return Genotype((k1, k2, k3, k4), (s1, s2, s3, 1), (e1, e2, e3, e4), heads, hidden=hidden)


class Policy:
    """Independent choices, each a softmax over logits, that follow rewards (REINFORCE with a moving baseline).

    The baseline is the bias-corrected moving average of the rewards, the present one included.

    Args:
        sizes: number of options of each decision.
        lr: of Adam.
        seed: of the first logits, which are 0.001 times normal numbers, and of the samples.
        momentum: of the moving average.
    """

    def __init__(self, sizes: Sequence[int], *, lr: float = 0.08, seed: int = 0, momentum: float = 0.9) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = [(1e-3 * torch.randn(size, generator=self.generator)).requires_grad_() for size in sizes]
        self.optimizer = torch.optim.Adam(self.logits, lr=lr)
        self.momentum = momentum
        self.average, self.steps = 0.0, 0

    def sample(self) -> list[int]:
        """One index for each decision."""
        probabilities = [logits.detach().softmax(0) for logits in self.logits]
        return [int(torch.multinomial(each, 1, generator=self.generator)) for each in probabilities]

    def best(self) -> list[int]:
        """The most probable index of each decision."""
        return [int(logits.argmax()) for logits in self.logits]

    def entropy(self) -> float:
        """Entropy of the choices, in nats."""
        each = [torch.distributions.Categorical(logits=logits.detach()).entropy() for logits in self.logits]
        return float(sum(each, torch.zeros(())))

    def learn(self, actions: Sequence[int], reward: float) -> None:
        """One step: minus the logarithm of the actions' probability, times the reward less the baseline."""
        self.steps += 1
        self.average = self.momentum * self.average + (1 - self.momentum) * reward
        baseline = self.average / (1 - self.momentum**self.steps)
        chosen = [logits.log_softmax(0)[action] for logits, action in zip(self.logits, actions, strict=True)]
        loss = -(reward - baseline) * torch.stack(chosen).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain data for JSON."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "logits": [logits.tolist() for logits in self.logits],
            "moments": [[moments[i]["exp_avg"].tolist(), moments[i]["exp_avg_sq"].tolist()] for i in moments],
            "generator": base64.b64encode(bytes(self.generator.get_state().tolist())).decode(),
            "average": self.average,
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for logits, values in zip(self.logits, state["logits"], strict=True):
            logits.data = torch.tensor(values)
        self.generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state["generator"])), dtype=torch.uint8))
        self.average, self.steps = state["average"], state["steps"]
        held = self.optimizer.state_dict()
        held["state"] = {
            index: {
                "step": torch.tensor(float(self.steps)),
                "exp_avg": torch.tensor(first),
                "exp_avg_sq": torch.tensor(second),
            }
            for index, (first, second) in enumerate(state["moments"])
        }
        self.optimizer.load_state_dict(held)


class Rewards:
    """How much better the scores of each network are than those of the one before.

    The change of a score is divided by its range among the last values: r = sum of +-(s_t - s_(t-1)) / (max - min +
    1e-6), minus for the condition, plus for the length. The first reward is 0.

    Args:
        buffer_size: number of last values, the present one included.
        names: scores that count.
        reference: as in the authors' code, take a condition that could not be computed, -1 there, as a value where
            both scores count. Otherwise the worst condition so far takes its place.

    Raises:
        ValueError: buffer_size is smaller than 2, or names is empty.
    """

    def __init__(
        self, buffer_size: int = 20, names: Iterable[ScoreName] = ("ntk", "length"), *, reference: bool = False
    ) -> None:
        if buffer_size < 2:
            raise ValueError(f"buffer_size must be at least 2, got {buffer_size}")
        self.buffer_size, self.names, self.reference = buffer_size, tuple(names), reference
        if not self.names:
            raise ValueError("names must hold at least one score, got none")
        for name in self.names:
            if name not in get_args(ScoreName):
                raise unknown("score", name, get_args(ScoreName))
        self.values: dict[str, list[float]] = {name: [] for name in self.names}

    def __call__(self, scores: Mapping[str, float]) -> float:
        """The reward of the next network.

        Args:
            scores: its scores by name; a condition that is not finite stands for a network that cannot be trained.

        Raises:
            ValueError: the length distortion is not finite.
        """
        total = 0.0
        for name, before in self.values.items():
            value = scores[name]
            if not math.isfinite(value):
                if name != "ntk":
                    raise ValueError(f"scores must be finite, got a {name} of {value}")
                value = -1.0 if self.reference and len(self.names) > 1 else max(before, default=0.0)
            before.append(value)
            last = before[-self.buffer_size :]
            if len(before) > 1:
                change = (value - before[-2]) / (max(last) - min(last) + 1e-6)
                total += -change if name == "ntk" else change
        return total
