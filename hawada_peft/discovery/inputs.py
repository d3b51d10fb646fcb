"""
Example inputs of the kinds that a model takes, made from its config and the signature of its forward pass.

Long because each kind is made in its own way.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from ..errors import BadDataError

logger = logging.getLogger(__name__)

UNKNOWN = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What a model raises that wants other inputs than those that could be drawn."""

TOKEN = re.compile(r"token_(id|index)$")
"""Names of config fields that hold a special token."""

MAIN_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")
"""What models are about, as transformers calls it."""

IMAGE_SIDE, SAMPLES_PER_FRAME, FRAMES = 224, 320, 24
"""Where the config does not say: pixels along a side, samples of a waveform per frame; frames of an example."""


def example_inputs(
    model: PreTrainedModel, *, rows: int = 2, length: int = 16, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Inputs of the kinds that a model takes, drawn at random but always the same.

    Text, images and audio of a config's own or of its sub-configs; of models of several, all of them, with the tokens
    that stand for an image where they belong; text alone where a model wants more of an image or a sound than can be
    guessed; for encoder-decoders the decoder's tokens, too. Texts hold no special tokens, but end in one of an end
    where a model that does not generate may pool there.

    Args:
        model: its class and config say what it takes; its weights are used where it has to be asked how many tokens an
            image is.
        rows: examples; one where a head classifies sequences and no token is padding, by which it would find the end
            of each row.
        length: tokens of a text, at most the positions that there are.
        given: arguments by name, instead of drawn ones; rows as they are.

    Returns:
        Keyword arguments of the forward pass, on the model's device and in its dtype.

    Raises:
        BadDataError: if it needs an argument that cannot be guessed, naming it.
    """
    return Drawn(model, rows, length, dict(given or {})).everything()


def main_inputs(model: PreTrainedModel) -> set[str]:
    """Which of `MAIN_INPUTS` a call of a model needs, its weights wherever they are."""
    drawn = Drawn(model, 1, 1, {})
    return {name for name in MAIN_INPUTS if name in drawn.parameters and drawn.takes(name)}


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and its sub-configs, at any depth."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from configs_of(inner)


def field_of(config: PreTrainedConfig, field: str) -> Any:
    """A field of the first config that has it: the model's own, then its sub-configs'; None if none has."""
    found = (getattr(each, field, None) for each in configs_of(config))
    return next((value for value in found if value is not None), None)


class Drawn:
    """
    The inputs of one model, drawn one kind after the other.

    Args:
        model: the model.
        rows: as in `example_inputs`.
        length: as in `example_inputs`.
        inputs: what is given; the rest is added to it.
    """

    def __init__(self, model: PreTrainedModel, rows: int, length: int, inputs: dict[str, Any]) -> None:
        self.model, self.rows, self.inputs = model, rows, inputs
        self.configs = list(configs_of(model.config))
        self.text = model.config.get_text_config()
        self.generator = torch.Generator().manual_seed(0)
        self.made: dict[str, dict[str, Any]] = {}
        self.parameters = self.arguments()
        alone = getattr(self.text, "pad_token_id", None) is None and type(model).__name__ in CLASSIFIERS.values()
        self.rows = 1 if alone and "input_ids" in self.parameters else rows
        positions = self.number("max_position_embeddings", self.text) or length
        self.length = min(length, positions)

    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """Of the forward pass; where a wrapper hides them, the one that every model names."""
        found = inspect.signature(self.model.forward).parameters
        if all(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in found.values()):
            main = inspect.Parameter(self.model.main_input_name, inspect.Parameter.KEYWORD_ONLY)
            return {**found, main.name: main}
        return found

    def everything(self) -> dict[str, Any]:
        """See `example_inputs`."""
        # Each kind where the model takes it: as its main input, or beside it where a sub-config is about it.
        makers = {
            "pixel_values": self.pixels,
            "input_values": self.sound,
            "input_features": self.features,
            "input_ids": self.tokens,
            "decoder_input_ids": self.decoder_tokens,
            "bbox": self.boxes,
            "noise": self.noise,
        }
        for name, make in makers.items():
            if name in self.parameters and name not in self.inputs and self.takes(name):
                try:
                    self.made[name] = make()
                except UNKNOWN as error:
                    self._without(name, error)
                self.inputs |= self.made.get(name, {})
        needed = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and name not in self.inputs
        ]
        if needed or not self.inputs:
            raise BadDataError(
                f"{type(self.model).__name__} takes {sorted(self.parameters)}, and what goes into "
                f"{needed or 'it'} cannot be guessed: give example inputs by their names"
            )
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.inputs.items()
        }

    def _without(self, name: str, error: Exception) -> None:
        logger.info("%s gets no example %s: %s", type(self.model).__name__, name, error)

    def takes(self, name: str) -> bool:
        """Whether an argument that the forward pass has is one that the model needs."""
        if name == self.model.main_input_name:
            return True
        if name == "input_ids":
            return self.number("vocab_size", self.text) is not None
        if name == "decoder_input_ids":
            return bool(self.model.config.is_encoder_decoder)
        if name == "pixel_values":
            return self.of("patch_size") is not None and self.of("visual_embed") is not False
        if name in ("input_features", "input_values"):
            return self.token("audio") is not None
        return True

    # -- what configs say

    def of(self, field: str) -> Any:
        """As `field_of`."""
        return field_of(self.model.config, field)

    @staticmethod
    def number(field: str, config: PreTrainedConfig) -> int | None:
        """A whole number of a config."""
        value = getattr(config, field, None)
        return value if isinstance(value, int) and value > 0 else None

    def token(self, kind: str) -> int | None:
        """The token that stands for a part of an image or of a sound."""
        found = (self.of(f"{kind}_{name}") for name in ("token_id", "token_index"))
        return next((value for value in found if value is not None), None)

    # -- the kinds

    def ids(self, length: int) -> torch.Tensor:
        """Token ids, none of them special. (rows, length)"""
        special = {
            value
            for config in self.configs
            for name, value in vars(config).items()
            if TOKEN.search(name) and isinstance(value, int)
        }
        plain = [token for token in range(min(self.text.vocab_size, 4096)) if token not in special] or [0]
        return torch.tensor(plain)[torch.randint(len(plain), (self.rows, length), generator=self.generator)]

    def tokens(self) -> dict[str, Any]:
        """Text, with the tokens of an image or a sound behind its first three."""
        ids = self.ids(self.length)
        end = getattr(self.text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < self.text.vocab_size and not self.model.can_generate():
            ids[:, -1] = end
        standing = torch.zeros_like(ids)
        for kind, name in (("image", "pixel_values"), ("audio", "input_features")):
            token = self.token(kind)
            if token is None or name not in self.inputs:
                continue
            try:
                here = torch.full((self.rows, self.count(kind)), token)
            except UNKNOWN as error:  # it wants more than can be guessed, as the sizes that images had
                if name not in self.made:
                    raise
                self.inputs = {key: each for key, each in self.inputs.items() if key not in self.made[name]}
                self._without(name, error)
                continue
            ids = torch.cat([ids[:, :3], here, ids[:, 3:]], 1)
            standing = torch.cat([standing[:, :3], torch.ones_like(here), standing[:, 3:]], 1)
        types = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in self.parameters), None)
        more = {types: standing} if types is not None and standing.any() else {}
        return {"input_ids": ids} | more

    def count(self, kind: str) -> int:
        """How many tokens of the text one image or sound is: as many as the model makes vectors of it."""
        wanted = inspect.signature(getattr(self.model, f"get_{kind}_features")).parameters
        with torch.no_grad():
            made = getattr(self.model, f"get_{kind}_features")(
                **{
                    name: value.to(device=self.model.device, dtype=self.model.dtype)
                    if isinstance(value, torch.Tensor) and value.is_floating_point()
                    else value
                    for name, value in self.inputs.items()
                    if name in wanted
                }
            )
        made = getattr(made, "pooler_output", made)
        parts = made if isinstance(made, tuple | list) else [made]
        vectors = sum(part.numel() // part.shape[-1] for part in parts)
        return max(1, cast(int, vectors) // self.rows)

    def decoder_tokens(self) -> dict[str, Any]:
        """Half as many as the text's."""
        return {"decoder_input_ids": self.ids(max(2, self.length // 2))}

    def pixels(self) -> dict[str, Any]:
        """An image of each row; a video where the config counts frames; patches where the model takes those."""
        size, channels = self.of("image_size") or IMAGE_SIDE, self.of("num_channels") or self.of("in_channels") or 3
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        if "image_grid_thw" in self.parameters:
            merge, patch, frames = self.of("spatial_merge_size"), self.of("patch_size"), self.of("temporal_patch_size")
            grid = torch.tensor([[1, 2 * merge, 2 * merge]] * self.rows)
            shape: tuple[int, ...] = (int(grid.prod(1).sum()), channels * (frames or 1) * patch**2)
            return {"pixel_values": self.draw(*shape), "image_grid_thw": grid}
        if "spatial_shapes" in self.parameters:
            side = math.isqrt(self.of("num_patches") or 16)
            patches = self.draw(self.rows, side * side, channels * self.of("patch_size") ** 2)
            mask = torch.ones(self.rows, side * side, dtype=torch.long)
            shapes = torch.tensor([[side, side]] * self.rows)
            return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        if "image_sizes" in self.parameters:
            sizes = {"image_sizes": torch.tensor([[height, width]] * self.rows)}
            if grids := self.of("image_grid_pinpoints"):
                tiles = 1 + max(math.ceil(high / height) * math.ceil(wide / width) for high, wide in grids)
                return {"pixel_values": self.draw(self.rows, tiles, channels, height, width)} | sizes
            towers = (each for each in self.model.modules() if isinstance(each, PreTrainedModel))
            towers = (each for each in towers if each.main_input_name == "pixel_values")
            if any("image_sizes" in inspect.signature(each.forward).parameters for each in towers):
                return {"pixel_values": self.draw(self.rows, channels, height, width)} | sizes
        if self.of("num_frames"):
            return {"pixel_values": self.draw(self.rows, self.of("num_frames"), channels, height, width)}
        if "pixel_attention_mask" in self.parameters and "input_ids" in self.parameters:
            return {"pixel_values": self.draw(self.rows, 1, channels, height, width)}
        return {"pixel_values": self.draw(self.rows, channels, height, width)}

    def sound(self) -> dict[str, Any]:
        """Waveforms; spectrograms where the config counts their bins."""
        bins, frames = self.of("num_mel_bins"), self.of("max_length")
        if bins is not None and self.of("patch_size") is not None:
            return {"input_values": self.draw(self.rows, frames, bins)}
        strides = self.of("conv_stride")
        per_frame = math.prod(strides) if isinstance(strides, list | tuple) else SAMPLES_PER_FRAME
        kernels = self.of("conv_kernel")
        longest = sum(kernels) * per_frame // 4 if isinstance(kernels, list | tuple) else 0
        return {"input_values": self.draw(self.rows, per_frame * FRAMES + longest)}

    def features(self) -> dict[str, Any]:
        """Spectrograms: of the length that positions ask for, bins first, where the config counts both."""
        bins, positions = self.of("num_mel_bins"), self.of("max_source_positions")
        if bins is not None and positions is not None:
            return {"input_features": self.draw(self.rows, bins, 2 * positions)}
        size = self.of("feature_projection_input_dim") or self.of("input_feat_per_channel") or bins
        return {"input_features": self.draw(self.rows, FRAMES, size)}

    def boxes(self) -> dict[str, Any]:
        """Where each token stands on a page. (rows, length, 4): left, top, right, bottom"""
        most = (self.of("max_2d_position_embeddings") or 1024) // 2
        corners = torch.randint(most, (self.rows, self.length, 4), generator=self.generator)
        return {"bbox": torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] // 2], -1)}

    def noise(self) -> dict[str, Any]:
        """By which patches are masked: given, the model does not draw it itself."""
        size, patch = self.of("image_size"), self.of("patch_size")
        patches = math.prod(side // patch for side in ((size, size) if isinstance(size, int) else size))
        return {"noise": torch.arange(float(patches)).repeat(self.rows, 1)}

    def draw(self, *shape: int) -> torch.Tensor:
        """
        Numbers of a normal distribution.

        Raises:
            BadDataError: if a size is in no config.
        """
        if not all(isinstance(size, int) for size in shape):
            raise BadDataError(
                f"how large an input of {type(self.model).__name__} is cannot be guessed from its config: give example"
                " inputs by their names"
            )
        return torch.randn(*shape, generator=self.generator)
