"""Families of transformers as tiny models with random weights: a list, sizes that fit most, and what single ones want besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

ROWS, TOKENS = 3, 6

# Every size that a configuration may have, by name; one that it lacks is not given.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_labels"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "type_vocab_size": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "rotary_dim": 4,
    "state_size": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "sliding_window": 16,
    **dict.fromkeys(("dropout", "dropout_rate", "hidden_dropout", "hidden_dropout_prob", "attention_dropout"), 0.0),
    **dict.fromkeys(
        ("attention_probs_dropout_prob", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0
    ),
    **dict.fromkeys(("layerdrop", "resid_pdrop", "attn_pdrop", "embd_pdrop", "residual_dropout", "final_dropout"), 0.0),
}


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    """What a language model reads: token ids ``[rows, length]``."""
    generator = torch.Generator().manual_seed(rows + 100 * length)
    return {"input_ids": torch.randint(3, 60, (rows, length), generator=generator)}


def pairs(rows: int, length: int) -> dict[str, Tensor]:
    """What an encoder and decoder read; the decoder's texts are shorter."""
    return {**tokens(rows, length), "decoder_input_ids": tokens(rows, length - 2)["input_ids"]}


def pictures(rows: int, length: int) -> dict[str, Tensor]:
    """What a vision model reads: ``[rows, 3, 16, 16]``, whatever the length."""
    generator = torch.Generator().manual_seed(rows)
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}


def sounds(rows: int, length: int) -> dict[str, Tensor]:
    """What a model of sounds reads: ``[rows, 80 * length]``."""
    generator = torch.Generator().manual_seed(rows)
    return {"input_values": torch.randn(rows, 80 * length, generator=generator)}


@dataclass(frozen=True)
class Family:
    """A kind of model: its `model_type`, its class, what its configuration wants besides `SIZES`, and what it reads.

    without: sizes that its configuration refuses. prepare: what is done to the model once made.
    """

    kind: str
    cls: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    inputs: Callable[[int, int], dict[str, Tensor]] = tokens
    prepare: Callable[[Any], object] | None = None

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has it."""
        return self.kind in CONFIG_MAPPING and hasattr(transformers, self.cls)

    def config(self) -> Any:
        """Its configuration, with sizes that make a model of some ten thousand parameters."""
        cls: Any = CONFIG_MAPPING[self.kind]
        default = cls()
        sizes = {k: v for k, v in SIZES.items() if k not in self.without and hasattr(default, k)}
        config = cls(**{**sizes, **self.settings})
        config._experts_implementation = "eager"  # the others have no float64
        return config

    def model(self) -> Any:
        """The model in float64, with the same random weights each time, ready for inference."""
        torch.manual_seed(0)
        model = getattr(transformers, self.cls)(self.config())
        if self.prepare is not None:
            self.prepare(model)
        _make_no_weight_zero(model)
        return model.double().eval()


def _make_no_weight_zero(model: nn.Module) -> None:
    """Biases and gates that start at zero hide faults; here they are small."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def causal(kinds: str, suffix: str = "ForCausalLM") -> list[Family]:
    """Families whose class is called like their kind in capitals: "qwen2:Qwen2" and so on."""
    return [Family(*_kind_and_class(entry, suffix)) for entry in kinds.split()]


def _kind_and_class(entry: str, suffix: str) -> tuple[str, str]:
    kind, _, stem = entry.partition(":")
    return kind, stem + suffix


WITH_EXPERTS = (
    *(
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5_moe",
        "flex_olmo",
        "glm4_moe",
        "gpt_oss",
        "granitemoe",
        "granitemoehybrid",
    ),
    *("granitemoeshared", "jamba", "jetmoe", "llama4_text", "minimax", "mixtral", "olmoe", "phimoe", "qwen2_moe"),
    *("qwen3_moe", "qwen3_next"),
)
"""Those whose experts lie in parameters of three dimensions."""

ALIKE = (
    *(
        "apertus",
        "arcee",
        "cohere",
        "ernie4_5",
        "exaone4",
        "glm",
        "glm4",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "mistral",
    ),
    *("nemotron", "olmo", "olmo2", "persimmon", "qwen2", "seed_oss", "smollm3", "starcoder2"),  # llama, olmo3, qwen3
    *("granitemoe", "olmoe", "phimoe", "qwen2_moe"),  # mixtral, qwen3_moe
    *("blenderbot", "m2m_100", "marian", "mbart", "pegasus"),  # bart
    *("mt5", "umt5"),  # t5
    *("electra", "roberta", "xlm-roberta"),  # bert
    *("codegen", "deit", "hubert", "wavlm"),  # gptj, vit, wav2vec2
)
"""Those whose linear layers lie as in another family that is here."""

FAMILIES: list[Family] = [
    *causal(
        "llama:Llama mistral:Mistral mixtral:Mixtral qwen2:Qwen2 qwen2_moe:Qwen2Moe qwen3:Qwen3 qwen3_moe:Qwen3Moe gemma:Gemma "
        "gemma2:Gemma2 gemma3_text:Gemma3 phi:Phi phi3:Phi3 phimoe:Phimoe granite:Granite granitemoe:GraniteMoe "
        "granitemoeshared:GraniteMoeShared olmo:Olmo olmo2:Olmo2 olmo3:Olmo3 olmoe:Olmoe stablelm:StableLm starcoder2:Starcoder2 "
        "cohere:Cohere cohere2:Cohere2 glm:Glm glm4:Glm4 glm4_moe:Glm4Moe gpt_neox:GPTNeoX gptj:GPTJ codegen:CodeGen "
        "gpt_bigcode:GPTBigCode bloom:Bloom mpt:Mpt opt:OPT persimmon:Persimmon nemotron:Nemotron smollm3:SmolLM3 arcee:Arcee "
        "apertus:Apertus bitnet:BitNet diffllama:DiffLlama ernie4_5:Ernie4_5 ernie4_5_moe:Ernie4_5_Moe exaone4:Exaone4 "
        "helium:Helium hunyuan_v1_dense:HunYuanDenseV1 lfm2:Lfm2 minimax:MiniMax "
        "seed_oss:SeedOss gpt_oss:GptOss jetmoe:JetMoe deepseek_v2:DeepseekV2 mamba:Mamba falcon_mamba:FalconMamba "
        "biogpt:BioGpt flex_olmo:FlexOlmo llama4_text:Llama4"
    ),
    Family("gpt2", "GPT2LMHeadModel"),
    Family("openai-gpt", "OpenAIGPTLMHeadModel"),
    Family("ctrl", "CTRLLMHeadModel", {"dff": 64}),
    Family("xlnet", "XLNetLMHeadModel", {}, ("max_position_embeddings",)),
    Family("falcon", "FalconForCausalLM", {}, ("head_dim",)),
    Family("gpt_neo", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {"num_key_value_heads": 4, "first_k_dense_replace": 1},  # the first layer has no experts
        ("head_dim",),
    ),
    Family("mamba2", "Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    Family("jamba", "JambaForCausalLM", {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}),
    Family("bamba", "BambaForCausalLM", {"attn_layer_indices": [1], "mamba_chunk_size": 4, "mamba_n_groups": 1}),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {"layers_block_type": ["mamba", "attention"], "mamba_chunk_size": 4},
    ),
    Family(
        "zamba2",
        "Zamba2ForCausalLM",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "adapter_rank": 4,
        },
    ),
    Family("falcon_h1", "FalconH1ForCausalLM", {"mamba_d_ssm": 64, "mamba_chunk_size": 4}),
    Family("recurrent_gemma", "RecurrentGemmaForCausalLM", {"num_hidden_layers": 3, "lru_width": 32}),
    Family("qwen3_next", "Qwen3NextForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
    *[
        Family(kind, cls, inputs=pairs)
        for kind, cls in (
            ("bart", "BartForConditionalGeneration"),
            ("t5", "T5ForConditionalGeneration"),
            ("mt5", "MT5ForConditionalGeneration"),
            ("pegasus", "PegasusForConditionalGeneration"),
            ("marian", "MarianMTModel"),
            ("mbart", "MBartForConditionalGeneration"),
            ("m2m_100", "M2M100ForConditionalGeneration"),
            ("blenderbot", "BlenderbotForConditionalGeneration"),
            ("longt5", "LongT5ForConditionalGeneration"),
            ("umt5", "UMT5ForConditionalGeneration"),
            ("switch_transformers", "SwitchTransformersForConditionalGeneration"),
        )
    ],
    Family("fsmt", "FSMTForConditionalGeneration", {"src_vocab_size": 64, "tgt_vocab_size": 64}, inputs=pairs),
    Family(
        "led",
        "LEDForConditionalGeneration",
        {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        inputs=pairs,
    ),
    *[
        Family(kind, cls)
        for kind, cls in (
            ("bert", "BertForSequenceClassification"),
            ("roberta", "RobertaForMaskedLM"),
            ("xlm-roberta", "XLMRobertaForMaskedLM"),
            ("distilbert", "DistilBertForMaskedLM"),
            ("albert", "AlbertForMaskedLM"),
            ("electra", "ElectraForSequenceClassification"),
            ("deberta", "DebertaForMaskedLM"),
            ("deberta-v2", "DebertaV2ForMaskedLM"),
            ("mpnet", "MPNetForMaskedLM"),
            ("modernbert", "ModernBertForMaskedLM"),
            ("convbert", "ConvBertForMaskedLM"),
            ("esm", "EsmForMaskedLM"),
            ("squeezebert", "SqueezeBertForMaskedLM"),
            ("nystromformer", "NystromformerForMaskedLM"),
        )
    ],
    Family("funnel", "FunnelForMaskedLM", {"block_sizes": [1, 1]}, ("num_hidden_layers",)),
    Family("mobilebert", "MobileBertForMaskedLM", {"embedding_size": 16}),
    Family("longformer", "LongformerForMaskedLM", {"attention_window": 4}),
    *[
        Family(kind, cls, {"image_size": 16, "patch_size": 4}, inputs=pictures)
        for kind, cls in (
            ("vit", "ViTForImageClassification"),
            ("deit", "DeiTForImageClassification"),
            ("beit", "BeitForImageClassification"),
            ("dinov2", "Dinov2ForImageClassification"),
        )
    ],
    *[
        Family(
            kind,
            cls,
            {
                "conv_dim": (16, 16),
                "conv_stride": (4, 4),
                "conv_kernel": (8, 8),
                "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 8,
                "num_conv_pos_embedding_groups": 2,
                "classifier_proj_size": 16,
            },
            inputs=sounds,
        )
        for kind, cls in (
            ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
            ("hubert", "HubertForSequenceClassification"),
            ("wavlm", "WavLMForSequenceClassification"),
        )
    ],
]
