"""What `glactl profile` is to measure: its options, checked, and the cases that they make."""

import re
from pathlib import Path
from typing import Any

import torch

from glactl import __version__
from glactl.device import device_name
from glactl.measure import Rates
from glactl.models.lm import LMSpec
from glactl.models.mixers import KINDS
from glactl.models.mixers import MIXERS as SPECS
from glactl.profile.cases import BOTH, PHASES, WORKS, Case
from glactl.profile.operators import OPERATORS, Shape
from glactl.profile.peers import measured
from glactl.spec import read
from glactl.spec_source import nearest

SECONDS = 0.3  # spent on repeating one measurement
SHORTEST = 256  # the crossover is looked for from this length on
VOCAB = 259  # of the models without a spec of their own: bytes and three marks
SLOTS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("operators", "layers", "models")
MIXERS = ("attention", "gla", "decay", "gsa")  # where none is named: the operators


def parse_lengths(text: str) -> list[int]:
    """Lengths from "512,1024" or a range "512:8192:x2" (512, 1024, ... up to 8192), ascending.

    Raises:
        ValueError: anything else, or a length below 1.
    """
    found: set[int] = set()
    for part in map(str.strip, text.split(",")):
        stretch = re.fullmatch(r"(\d+):(\d+)(?::x(\d+))?", part)
        low, high, factor = (int(n or 2) for n in stretch.groups()) if stretch else (0, 0, 0)
        if 1 <= low <= high and factor >= 2:
            while low <= high:
                found.add(low)
                low *= factor
        elif part.isdecimal() and int(part) >= 1:
            found.add(int(part))
        else:
            raise ValueError(
                f"seqlen is {part!r}; allowed: lengths of 1 or more, 512,1024, or a range "
                "512:8192:x2"
            )
    return sorted(found)


def parse_dtype(name: str) -> torch.dtype:
    """The element type of that name. Raises ValueError for any other."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


class Plan:
    """The settings of a profile, checked: what is measured, at which lengths."""

    def __init__(self, settings: dict[str, Any], device: torch.device, kernels: bool) -> None:
        gpu = device.type == "cuda"
        self.settings, self.device, self.kernels = settings, device, kernels
        self.lengths = parse_lengths(settings["seqlen"] or "1024")
        self.dtype = parse_dtype(settings["dtype"] or ("bf16" if gpu else "fp32"))
        longest = self.lengths[-1]
        self.tokens = settings["tokens"] or max(longest, 16_384 if gpu else 0)
        if self.tokens < longest:
            raise ValueError(
                f"tokens is {self.tokens}; allowed: at least the longest seqlen, {longest}"
            )
        self.parts = _names("parts", settings["parts"], PARTS) or ["operators", "models"]
        self.phases = _names("phase", settings["phase"], PHASES) or list(PHASES)
        known = tuple(dict.fromkeys([*MIXERS, *KINDS]))
        self.mixers = _names("mixers", settings["mixers"], known) or list(MIXERS)
        self.heads, self.width = settings["heads"] or 4, settings["width"] or (128 if gpu else 64)
        ours = {op.name for op in OPERATORS}
        names = [name for name in self.mixers if name in ours]
        self.operators = measured(names, device, self.dtype, bool(settings["fla"]))
        self.models = self._models() if set(self.parts) & {"layers", "models"} else {}

    def about(self) -> dict[str, Any]:
        """The head of the report."""
        gpu = self.device.type == "cuda"
        return {
            "glactl": __version__,
            "device": device_name(self.device),
            "threads": None if gpu else torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "settings": self.settings,
            "shape": {
                "heads": self.heads,
                "width": self.width,
                "slots": SLOTS,
                "tokens": self.tokens,
            },
            "models": {name: model.model_dump(mode="json") for name, model in self.models.items()},
        }

    def cases(self, reached: Rates) -> list[Case]:
        """By length, then operators, layers and models; each in a process of its own."""
        found: list[Case] = []
        for T in self.lengths:
            if "operators" in self.parts:
                works = WORKS["operator"]
                found += [self._case("operator", n, works, T, reached) for n in self.operators]
            for name, model in self.models.items():
                if "layers" in self.parts:
                    for kind, one in _layers(name, model).items():
                        found.append(self._case("layer", kind, WORKS["layer"], T, reached, one))
                if "models" in self.parts:
                    found.append(self._case("model", name, tuple(self.phases), T, reached, model))
        return found

    def scans(self, reached: Rates) -> list[Case]:
        """Where one length is asked for: operators at those below, for the crossover."""
        shorter: list[int] = []
        while len(self.lengths) == 1 and SHORTEST << len(shorter) < self.lengths[0]:
            shorter.append(SHORTEST << len(shorter))
        kinds = {name.partition(" ")[0] for name in self.operators}
        if not shorter or "operators" not in self.parts or kinds.isdisjoint({"attention"}):
            return []
        items = tuple((BOTH, T) for T in shorter)
        names = [name for name in self.operators if not name.endswith(" fla")]
        cases = [self._case("operator", n, (BOTH,), shorter[0], reached) for n in names]
        return [Case(**vars(case) | {"items": items, "scan": True}) for case in cases]

    def _case(
        self,
        part: str,
        name: str,
        works: tuple[str, ...],
        T: int,
        reached: Rates,
        spec: LMSpec | None = None,
    ) -> Case:
        batch = max(1, self.tokens // T)
        return Case(
            part,
            name,
            tuple((work, T) for work in works),
            Shape(batch, T, self.heads, self.width, SLOTS, self.dtype),
            str(self.device),
            reached,
            SECONDS,
            spec,
            kernels=self.kernels,
        )

    def _models(self) -> dict[str, LMSpec]:
        """Name -> model: of the spec, or two layers of each mixer in the operators' shape."""
        path, preset = self.settings["spec"], self.settings["preset"]
        if path is not None or preset is not None:
            model = read(None if path is None else Path(path), preset)[1].model
            name = preset if path is None else Path(path).stem
            vocab = model.vocab_size or VOCAB
            return {name: LMSpec.model_validate(model.model_dump() | {"vocab_size": vocab})}
        found: dict[str, LMSpec] = {}
        for name in self.mixers:
            if name not in KINDS:
                continue
            mixer: dict[str, Any] = {"kind": name}
            if "heads" in SPECS[KINDS.index(name)].model_fields:
                mixer["heads"] = self.heads
            sizes = {"d_model": self.heads * self.width, "n_layers": 2, "vocab_size": VOCAB}
            found[name] = LMSpec.model_validate(sizes | {"mixer": mixer})
        return found


def _layers(name: str, model: LMSpec) -> dict[str, LMSpec]:
    """Name of a layer -> a model of it, for every different mixer of the model."""
    different = {mixer.model_dump_json(): mixer for mixer in model.mixers}
    found: dict[str, LMSpec] = {}
    for mixer in different.values():
        label = mixer.kind if len(different) == 1 else f"{mixer.kind} {len(found) + 1}"
        found[label] = model.model_copy(update={"mixer": mixer})
    return found


def _names(option: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    """The names of a list, each once; empty where there is none. Raises ValueError."""
    if text is None:
        return []
    names = [n.strip() for n in text.split(",") if n.strip()]
    for name in names:
        if name not in known:
            hint = nearest(name, list(known))
            raise ValueError(f"{option} has {name!r}; allowed: {', '.join(known)}{hint}")
    if not names:
        raise ValueError(f"{option} is empty; allowed: {', '.join(known)}")
    return list(dict.fromkeys(names))
