"""StripedHyena as a model of vLLM. The formulas are those of ``hyaena.layers``; here they are shared out over GPUs."""

from hyaena.vllm.versions import check_versions

check_versions()

from collections.abc import Iterable, Sequence  # noqa: E402
from itertools import islice  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from vllm.compilation.decorators import support_torch_compile  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.distributed import get_pp_group  # noqa: E402
from vllm.distributed.utils import get_pp_indices  # noqa: E402
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear  # noqa: E402
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # noqa: E402
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # noqa: E402
from vllm.model_executor.models.interfaces import (  # noqa: E402
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsPP,
)
from vllm.model_executor.models.utils import (  # noqa: E402
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors  # noqa: E402

from hyaena import ops  # noqa: E402
from hyaena.config import ModelConfig  # noqa: E402
from hyaena.formats.names import part  # noqa: E402
from hyaena.formats.tensors import SCALES, check_tied, format_of  # noqa: E402
from hyaena.formats.transformers.tensors import our_name as without_prefix  # noqa: E402
from hyaena.layers import RMSNorm, Rotary  # noqa: E402
from hyaena.vllm.mixers import AttentionMixer, HyenaMixer  # noqa: E402
from hyaena.vllm.states import StatePages, chosen_layers, place, split  # noqa: E402


class GatedMLP(nn.Module):
    """``down(act(gate(x)) · up(x))``."""

    def __init__(self, config: ModelConfig, index: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        width, inner, quantization = config.hidden_size, config.intermediate_size, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            width, [inner] * 2, bias=False, quant_config=quantization, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, width, bias=False, quant_config=quantization, prefix=f"{prefix}.down_proj"
        )
        self.activation = config.activation_of(index)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return self.down_proj(ops.gate(gate, up, self.activation))[0]


class Layer(nn.Module):
    """One stripe: ``x += mixer(norm(x)); x += mlp(norm(x))``."""

    def __init__(
        self, config: ModelConfig, states: dict[int, tuple[StatePages, int]], vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        index = extract_layer_index(prefix)
        kind = config.layer_types[index]
        self.is_attention = kind == "attention"
        self.mixer_norm = RMSNorm(config)
        if self.is_attention:
            self.mixer: nn.Module = AttentionMixer(config, vllm_config, f"{prefix}.mixer")
        else:
            self.mixer = HyenaMixer(config, kind, *states[index], vllm_config, f"{prefix}.mixer")
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, index, vllm_config, f"{prefix}.mlp")

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        h = self.mixer_norm(x)
        x = x + (self.mixer(h, table) if self.is_attention else self.mixer(h))
        return x + self.mlp(self.mlp_norm(x))


# The dimensions are named: the decorator finds them by annotations otherwise, and cannot read those that are texts.
@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class HyaenaModel(nn.Module):
    """Embedding, layers and norm: this pipeline stage's part of them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.record()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.rotary = Rotary(config)
        if self.rotary.frequencies is not None:  # not every file has them
            self.rotary.frequencies.copy_(self.rotary.powers(self.rotary.frequencies.device))
        states = make_state_pages(config, vllm_config, f"{prefix}.layers")
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_layers, lambda prefix: Layer(config, states, vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(config) if get_pp_group().is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )
        self.dtype = vllm_config.model_config.dtype

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            x = inputs_embeds if inputs_embeds is not None else self.embed_input_ids(input_ids)
        else:
            x = intermediate_tensors["hidden_states"]
        table = self.rotary(positions, self.dtype)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x = layer(x, table)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x})
        return self.norm(x)


def make_state_pages(config: ModelConfig, vllm_config: VllmConfig, prefix: str) -> dict[int, tuple[StatePages, int]]:
    """The pages of this stage's Hyena layers: layer -> pages, and the layer's place in them.

    Pages are named by their first layer, since vLLM finds one number in the name of whatever has a cache.
    """
    group = get_pp_group()
    start, end = get_pp_indices(config.num_layers, group.rank_in_group, group.world_size)
    mine = [i for i in range(start, end) if config.layer_types[i] != "attention"]
    found = {}
    for layers in split(mine, chosen_layers(vllm_config)):
        kinds = [config.layer_types[i] for i in layers]
        pages = StatePages(config, kinds, vllm_config, f"{prefix}.{layers[0]}.states")
        found |= {layer: (pages, i) for i, layer in enumerate(layers)}
    return found


class HyaenaForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsPP, SupportsMambaPrefixCaching, SupportsLoRA):
    """A StripedHyena language model: SH-7B, Nous, Evo, Evo 2."""

    packed_modules_mapping = {  # noqa: RUF012, vLLM's interface
        "qkv_proj": ["qkv_proj"],
        "in_proj": ["in_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """The bytes of the largest page of states; the same plan makes the pages."""
        config = vllm_config.model_config.hf_config.record()
        kinds = [kind for kind in config.layer_types if kind != "attention"]
        ranks = vllm_config.parallel_config.tensor_parallel_size
        pages = split(kinds, chosen_layers(vllm_config))
        return ((max(place(config, kinds, ranks, vllm_config.model_config.dtype)[1] for kinds in pages),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """Pages are copied whole: no state is a window that vLLM could shift."""
        return (get_temporal_copy_spec,)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        config = self.record = self.config.record()
        self.model = HyaenaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
            if config.tie_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under our names or an original's; returns the names of the parameters that were loaded."""
        form, tied = format_of(self.record), self.record.tie_embeddings
        parameters = dict(self.named_parameters())
        buffers = dict(self.named_buffers())
        loaded: set[str] = set()
        embedding = head = None
        for key, weight in weights:
            ours = form.to_ours(without_prefix(key), weight, self.record)
            if ours is None or (part(ours[0]) == SCALES and f"model.{ours[0]}" not in buffers):
                continue
            name, weight = ours
            embedding = weight if name == "embed_tokens.weight" and tied else embedding
            if name == "lm_head.weight" and tied:
                head = weight
                continue
            loaded.update(self._load(name, weight, parameters, buffers))
        if head is not None:
            check_tied(embedding, head)
        return loaded

    def _load(
        self, name: str, weight: Tensor, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]
    ) -> Sequence[str]:
        shards = {f"mlp.{name}.": i for i, name in enumerate(("gate_proj", "up_proj"))}
        shard = next((i for place, i in shards.items() if place in name), None)
        if shard is not None:
            name = name.replace(".gate_proj.", ".gate_up_proj.").replace(".up_proj.", ".gate_up_proj.")
        name = name if name.startswith("lm_head.") else f"model.{name}"
        if is_pp_missing_parameter(name, self):
            return ()
        if name in buffers:
            buffers[name].copy_(weight)
            return ()
        parameter = parameters[name]
        loader = getattr(parameter, "weight_loader", None)
        if loader is None:
            parameter.data.copy_(weight)
        elif shard is None:
            loader(parameter, weight)
        else:
            loader(parameter, weight, shard)
        return (name,)
