"""The families of text encoders of Hugging Face, as data: keys of `config.json` and names of tensors.

`Family` explains the fields. A config that asks for something that the encoder cannot compute is refused by name.

In the tables, our names are on the left and those of transformers are on the right. `outside` and `inside` mean outside
and inside of the blocks.
"""

import dataclasses

from dualenc.formats.huggingface.family import ACTIVATION_NAMES, Config, Family
from dualenc.formats.huggingface.slots import (
    ClassificationSlot,
    MaskedLanguageSlot,
    ModernClassificationSlot,
    ModernMaskedLanguageSlot,
    ModernQuestionAnsweringSlot,
    ModernTokenClassificationSlot,
    PoolerSlot,
    QuestionAnsweringSlot,
    ReplacedTokenSlot,
    TokenClassificationSlot,
)
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError, first_failure

# Key of a BERT-like config -> values that can be computed: bidirectional encoders with learned absolute positions.
ENCODER = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
}
# Field of `TextConfig` -> key of a BERT-like config, and the value that a missing key means.
WIDTHS = {
    "vocab_size": ("vocab_size", 30522),
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
    "context_length": ("max_position_embeddings", 512),
    "types": ("type_vocab_size", 2),
    "activation": ("hidden_act", "gelu"),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "pad_id": ("pad_token_id", 0),
}
POST_NORM = {"norm": "post", "positions": "learned"}
# Modules of BERT, which most families share in part.
BERT_OUTSIDE = {
    "embeddings.token_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.segment_embeddings": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
BERT_INSIDE = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
DROPOUTS = ("hidden_dropout_prob",)  # keys of the dropout rate
POOLER = PoolerSlot("pooler", ".pooler.dense.weight", {"dense": ".pooler.dense"}, activation="tanh")
TOP_CLASSIFIER = ClassificationSlot(  # two layers above the encoder (RoBERTa, ELECTRA)
    "classification",
    "classifier.out_proj.weight",
    {"dense": "classifier.dense", "out": "classifier.out_proj"},
    activation="tanh",
    architecture="ForSequenceClassification",
)
TAGGER = TokenClassificationSlot(
    "token_classification", "classifier.weight", {"out": "classifier"}, architecture="ForTokenClassification"
)
ANSWERS = QuestionAnsweringSlot(
    "answers", "qa_outputs.weight", {"out": "qa_outputs"}, architecture="ForQuestionAnswering"
)

BERT = Family(
    name="bert",
    stem="Bert",
    prefix="bert.",
    keys=WIDTHS,
    always=POST_NORM,
    refused=ENCODER,
    outside=BERT_OUTSIDE,
    block="encoder.layer.{i}",
    inside=BERT_INSIDE,
    dropouts=DROPOUTS,
    slots=(
        MaskedLanguageSlot(
            "mlm",
            "cls.predictions.transform.dense.weight",
            {"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm"},
            {
                "output_embeddings": ("cls.predictions.decoder.weight",),
                "bias": ("cls.predictions.bias", "cls.predictions.decoder.bias"),
            },
            architecture="ForMaskedLM",
        ),
        ClassificationSlot(
            "nsp",
            "cls.seq_relationship.weight",
            {"dense": ".pooler.dense", "out": "cls.seq_relationship"},
            activation="tanh",
            labels=("IsNext", "NotNext"),
            architecture="ForNextSentencePrediction",
        ),
        ClassificationSlot(
            "classification",
            "classifier.weight",
            {"dense": ".pooler.dense", "out": "classifier"},
            activation="tanh",
            architecture="ForSequenceClassification",
        ),
        TAGGER,
        ANSWERS,
        POOLER,
    ),
)


def _roberta_read(config: Config, fields: Config) -> None:
    """Set the offset of positions, which begin after the number of the padding token."""
    if fields["pad_id"] < 0:
        raise ModelError(f"pad_token_id {fields['pad_id']} must not be negative: positions begin after it")
    fields["position_offset"] = fields["pad_id"] + 1
    fields["context_length"] -= fields["position_offset"]


def _roberta_write(text: TextConfig, config: Config) -> None:
    """Reverse `_roberta_read`."""
    config["max_position_embeddings"] = text.context_length + text.position_offset
    config["pad_token_id"] = text.position_offset - 1


ROBERTA = dataclasses.replace(
    BERT,
    name="roberta",
    stem="Roberta",
    prefix="roberta.",
    keys={**WIDTHS, "vocab_size": ("vocab_size", 50265), "pad_id": ("pad_token_id", 1)},
    slots=(
        MaskedLanguageSlot(
            "mlm",
            "lm_head.dense.weight",
            {"dense": "lm_head.dense", "norm": "lm_head.layer_norm"},
            {"output_embeddings": ("lm_head.decoder.weight",), "bias": ("lm_head.bias", "lm_head.decoder.bias")},
            activation="gelu",
            architecture="ForMaskedLM",
        ),
        TOP_CLASSIFIER,
        TAGGER,
        ANSWERS,
        POOLER,
    ),
    read=_roberta_read,
    write=_roberta_write,
)


def _albert_read(config: Config, fields: Config) -> None:
    """Check the groups of layers, which transformers computes by a quotient of floats and the encoder by integers."""
    layers, groups = fields["layers"], fields["groups"]
    if [int(i / (layers / groups)) for i in range(layers)] != [i * groups // layers for i in range(layers)]:
        raise ModelError(f"num_hidden_groups {groups} of {layers} layers: dualenc cannot compute these groups")


ALBERT = dataclasses.replace(
    BERT,
    name="albert",
    stem="Albert",
    prefix="albert.",
    keys={
        **WIDTHS,
        "vocab_size": ("vocab_size", 30000),
        "width": ("hidden_size", 4096),
        "heads": ("num_attention_heads", 64),
        "mlp_width": ("intermediate_size", 16384),
        "activation": ("hidden_act", "gelu_new"),
        "embed_width": ("embedding_size", 128),
        "groups": ("num_hidden_groups", 1),
        "group_size": ("inner_group_num", 1),
    },
    outside={**BERT_OUTSIDE, "embeddings.projection": "encoder.embedding_hidden_mapping_in"},
    block="encoder.albert_layer_groups.{group}.albert_layers.{member}",
    inside={
        "attention.qkv": ("attention.query", "attention.key", "attention.value"),
        "attention.out": "attention.dense",
        "attention_norm": "attention.LayerNorm",
        "mlp.0": "ffn",
        "mlp.2": "ffn_output",
        "mlp_norm": "full_layer_layer_norm",
    },
    slots=(
        MaskedLanguageSlot(
            "mlm",
            "predictions.dense.weight",
            {"dense": "predictions.dense", "norm": "predictions.LayerNorm"},
            {
                "output_embeddings": ("predictions.decoder.weight",),
                "bias": ("predictions.bias", "predictions.decoder.bias"),
            },
            architecture="ForMaskedLM",
        ),
        ClassificationSlot(
            "nsp",  # ALBERT predicts the order of two sentences instead of the next one, with the same layers.
            "sop_classifier.classifier.weight",
            {"dense": ".pooler", "out": "sop_classifier.classifier"},
            activation="tanh",
            labels=("InOrder", "Swapped"),
            architecture="ForPreTraining",
        ),
        ClassificationSlot(
            "classification",
            "classifier.weight",
            {"dense": ".pooler", "out": "classifier"},
            activation="tanh",
            architecture="ForSequenceClassification",
        ),
        TAGGER,
        ANSWERS,
        PoolerSlot("pooler", ".pooler.weight", {"dense": ".pooler"}, activation="tanh"),
    ),
    read=_albert_read,
)
DISTILBERT = Family(
    name="distilbert",
    stem="DistilBert",
    prefix="distilbert.",
    keys={
        "vocab_size": ("vocab_size", 30522),
        "width": ("dim", 768),
        "layers": ("n_layers", 6),
        "heads": ("n_heads", 12),
        "mlp_width": ("hidden_dim", 3072),
        "context_length": ("max_position_embeddings", 512),
        "activation": ("activation", "gelu"),
        "pad_id": ("pad_token_id", 0),
    },
    always={**POST_NORM, "types": 0, "norm_eps": 1e-12},
    refused={},
    outside={key: name for key, name in BERT_OUTSIDE.items() if key != "embeddings.segment_embeddings"},
    block="transformer.layer.{i}",
    inside={
        "attention.qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "mlp.0": "ffn.lin1",
        "mlp.2": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
    dropouts=("dropout",),
    slots=(
        MaskedLanguageSlot(
            "mlm",
            "vocab_transform.weight",
            {"dense": "vocab_transform", "norm": "vocab_layer_norm"},
            {"output_embeddings": ("vocab_projector.weight",), "bias": ("vocab_projector.bias",)},
            architecture="ForMaskedLM",
        ),
        ClassificationSlot(
            "classification",
            "pre_classifier.weight",
            {"dense": "pre_classifier", "out": "classifier"},
            activation="relu",
            architecture="ForSequenceClassification",
        ),
        TAGGER,
        ANSWERS,
    ),
)


def _electra_read(config: Config, fields: Config) -> None:
    """Remove the width of the embeddings where it is the encoder's: then there is no projection."""
    if fields["embed_width"] == fields["width"]:
        fields["embed_width"] = None


def _electra_write(text: TextConfig, config: Config) -> None:
    """Reverse `_electra_read`."""
    config["embedding_size"] = text.embed_width or text.width


ELECTRA = dataclasses.replace(
    BERT,
    name="electra",
    stem="Electra",
    prefix="electra.",
    keys={
        **WIDTHS,
        "width": ("hidden_size", 256),
        "heads": ("num_attention_heads", 4),
        "mlp_width": ("intermediate_size", 1024),
        "embed_width": ("embedding_size", 128),
    },
    outside={**BERT_OUTSIDE, "embeddings.projection": "embeddings_project"},
    slots=(
        ReplacedTokenSlot(
            "rtd",
            "discriminator_predictions.dense.weight",
            {"dense": "discriminator_predictions.dense", "out": "discriminator_predictions.dense_prediction"},
            architecture="ForPreTraining",
        ),
        MaskedLanguageSlot(
            "mlm",
            "generator_predictions.dense.weight",
            {"dense": "generator_predictions.dense", "norm": "generator_predictions.LayerNorm"},
            {"output_embeddings": ("generator_lm_head.weight",), "bias": ("generator_lm_head.bias",)},
            activation="gelu",
            architecture="ForMaskedLM",
        ),
        dataclasses.replace(TOP_CLASSIFIER, activation="gelu"),
        TAGGER,
        ANSWERS,
    ),
    read=_electra_read,
    write=_electra_write,
)


def _modernbert_read(config: Config, fields: Config) -> None:
    """Set the windows, from a list of layers or from a number, the bases of the rotary angles, and the biases."""
    layers = fields["layers"]
    every = config.get("global_attn_every_n_layers") or 3
    kinds = config.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    whole = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    every = whole[1] if len(whole) > 1 else layers
    biases = {key: bool(config.get(key, False)) for key in BIASES}
    scaling, activation = config.get("rope_scaling"), config.get("classifier_activation", "gelu")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    recurs = whole == list(range(0, layers, every))
    checks = [
        (len(kinds) == layers, f"layer_types has {len(kinds)} entries, expected num_hidden_layers {layers}"),
        (not unknown, f"layer_types {sorted(unknown)} cannot be computed: use full_attention or sliding_attention"),
        (recurs, f"layer_types {kinds}: full_attention must be at the first layer and at every n-th after it"),
        (not scaling, f"rope_scaling {scaling!r} cannot be computed by dualenc"),
        (len(set(biases.values())) == 1, f"{', '.join(f'{key} {on}' for key, on in biases.items())}: must be equal"),
        (activation in ACTIVATION_NAMES, f"classifier_activation {activation!r} cannot be computed by dualenc"),
    ]
    if reason := first_failure(checks):
        raise ModelError(reason)
    thetas = {}
    old = {"full_attention": ("global_rope_theta", 160000.0), "sliding_attention": ("local_rope_theta", 10000.0)}
    for kind, (key, usual) in old.items():
        rope = (config.get("rope_parameters") or {}).get(kind) or {}
        if rope.get("rope_type", "default") != "default":
            raise ModelError(f"rope_parameters.{kind}.rope_type {rope['rope_type']!r} cannot be computed by dualenc")
        theta = rope.get("rope_theta", config.get(key))
        thetas[kind] = float(usual if theta is None else theta)
    fields["theta"] = thetas["full_attention"]
    if len(whole) < layers:
        # transformers halves the window, so that an odd one means the same as the even one below it.
        fields["window"] = config.get("local_attention", 128) // 2 * 2
        fields["local_theta"], fields["global_every"] = thetas["sliding_attention"], every
    fields["bias"] = any(biases.values())


def _modernbert_write(text: TextConfig, config: Config) -> None:
    """Write what `_modernbert_read` reads, under the names of transformers 5 and of earlier versions."""
    local = text.theta if text.local_theta is None else text.local_theta
    thetas = {"full_attention": text.theta, "sliding_attention": local}
    config["layer_types"] = [f"{'full' if text.sees_all(i) else 'sliding'}_attention" for i in range(text.layers)]
    config["rope_parameters"] = {
        kind: {"rope_type": "default", "rope_theta": float(theta)} for kind, theta in thetas.items()
    }
    # Versions of transformers before 5 read only these older names.
    config |= {"global_rope_theta": float(text.theta), "local_rope_theta": float(local)}
    config["global_attn_every_n_layers"] = 1 if text.window is None else text.global_every
    config["local_attention"] = 128 if text.window is None else text.window
    config |= dict.fromkeys(BIASES, text.bias) | {"decoder_bias": True}


# Keys of the biases; `TextConfig` has one setting for all of them.
BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
MODERNBERT = Family(
    name="modernbert",
    stem="ModernBert",
    prefix="model.",
    keys={
        "vocab_size": ("vocab_size", 50368),
        "width": ("hidden_size", 768),
        "layers": ("num_hidden_layers", 22),
        "heads": ("num_attention_heads", 12),
        "mlp_width": ("intermediate_size", 1152),
        "context_length": ("max_position_embeddings", 8192),
        "activation": ("hidden_activation", "gelu"),
        "norm_eps": ("norm_eps", 1e-5),
        "pad_id": ("pad_token_id", 50283),
    },
    always={"norm": "pre", "positions": "rotary", "types": 0, "gated": True, "embed_norm": True},
    refused={"decoder_bias": (True,)},
    outside={
        "embeddings.token_embeddings": "embeddings.tok_embeddings",
        "embeddings.norm": "embeddings.norm",
        "norm": "final_norm",
    },
    token_embeddings="embeddings.tok_embeddings",
    block="layers.{i}",
    inside={
        "attention.qkv": "attn.Wqkv",
        "attention.out": "attn.Wo",
        "attention_norm": "attn_norm",
        "mlp.0": "mlp.Wi",
        "mlp.2": "mlp.Wo",
        "mlp_norm": "mlp_norm",
    },
    dropouts=("mlp_dropout", "embedding_dropout"),
    slots=(
        ModernMaskedLanguageSlot(
            "mlm",
            "decoder.bias",
            {"dense": "head.dense", "norm": "head.norm"},
            {"output_embeddings": ("decoder.weight",), "bias": ("decoder.bias",)},
            architecture="ForMaskedLM",
        ),
        ModernClassificationSlot(
            "classification",
            "classifier.weight",
            {"dense": "head.dense", "norm": "head.norm", "out": "classifier"},
            norm=True,
            architecture="ForSequenceClassification",
        ),
        ModernTokenClassificationSlot(
            "token_classification",
            "classifier.weight",
            {"dense": "head.dense", "norm": "head.norm", "out": "classifier"},
            norm=True,
            architecture="ForTokenClassification",
        ),
        ModernQuestionAnsweringSlot(
            "answers",
            "classifier.weight",
            {"dense": "head.dense", "norm": "head.norm", "out": "classifier"},
            norm=True,
            architecture="ForQuestionAnswering",
        ),
    ),
    read=_modernbert_read,
    write=_modernbert_write,
)
# Modules of a block of CLIP and SigLIP.
CLIP_INSIDE = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "mlp_norm": "layer_norm2",
}
# Tensors of a model of images and texts that are outside its text encoder.
OUTSIDE_TEXT = (r"vision_model\..*", r"visual_projection\..*", r"text_projection\..*", "logit_scale", "logit_bias")
CLIP = Family(
    name="clip_text_model",
    stem="CLIPText",
    prefix="text_model.",
    keys={
        "vocab_size": ("vocab_size", 49408),
        "width": ("hidden_size", 512),
        "layers": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", 8),
        "mlp_width": ("intermediate_size", 2048),
        "context_length": ("max_position_embeddings", 77),
        "activation": ("hidden_act", "quick_gelu"),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "pad_id": ("pad_token_id", 1),
    },
    always={"norm": "pre", "positions": "learned", "types": 0, "causal": True},
    refused={},
    outside={
        "embeddings.token_embeddings": "embeddings.token_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "norm": "final_layer_norm",
    },
    token_embeddings="embeddings.token_embedding",
    block="encoder.layers.{i}",
    inside=CLIP_INSIDE,
    ignored=OUTSIDE_TEXT,
    nested="clip",
    pool="last",
)


def _siglip_read(config: Config, fields: Config) -> None:
    """Set the length to which texts are padded: the tower attends to its padding."""
    fields["pad_to"] = fields["context_length"]


SIGLIP = dataclasses.replace(
    CLIP,
    name="siglip_text_model",
    stem="SiglipText",
    keys={
        **CLIP.keys,
        "vocab_size": ("vocab_size", 32000),
        "width": ("hidden_size", 768),
        "heads": ("num_attention_heads", 12),
        "mlp_width": ("intermediate_size", 3072),
        "context_length": ("max_position_embeddings", 64),
        "activation": ("hidden_act", "gelu_pytorch_tanh"),
        "norm_eps": ("layer_norm_eps", 1e-6),
    },
    always={**CLIP.always, "causal": False},
    ignored=(*OUTSIDE_TEXT, r"(text_model\.)?head\..*"),  # a linear map after pooling, outside the encoder
    nested="siglip",
    read=_siglip_read,
)
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        BERT,
        ROBERTA,
        ALBERT,
        DISTILBERT,
        ELECTRA,
        MODERNBERT,
        CLIP,
        SIGLIP,
        dataclasses.replace(ROBERTA, name="xlm-roberta", stem="XLMRoberta"),
        dataclasses.replace(ROBERTA, name="camembert", stem="Camembert"),
    )
}
