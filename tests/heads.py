"""Tiny models of many families of transformers with every head that a family has, and one step of each beside the original.

`cases(kinds)` names them; `compared(mesh, name)` gives the relative errors of loss, logits and all gradients as one vector, or the
words of a refusal.
"""

import copy
from typing import Any

import torch

from families import joint_error, plain
from grids import relative

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    num_labels=3,
    attention_dropout=0.0,
)
GPT2 = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, num_labels=3)
GPT2 |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
BERT = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim", "attention_dropout")}
BERT |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SEQ2SEQ = dict(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
SEQ2SEQ |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2)
SEQ2SEQ |= dict(
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, decoder_start_token_id=2, num_labels=3, forced_eos_token_id=None
)
XLNET = dict(
    vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0, pad_token_id=1, num_labels=3, summary_last_dropout=0.0
)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Gemma": SIZES,
    "Gemma2": SIZES | dict(query_pre_attn_scalar=8),
    "Phi": SIZES | dict(num_key_value_heads=4),
    "Phi3": SIZES,
    "Olmo": SIZES,
    "Olmo2": SIZES,
    "StableLm": SIZES,
    "Granite": SIZES,
    "Cohere": SIZES,
    "Starcoder2": SIZES | dict(residual_dropout=0.0, embedding_dropout=0.0),
    "Glm": SIZES,
    "Helium": SIZES,
    "SmolLM3": SIZES,
    "GPTNeoX": {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")} | dict(hidden_dropout=0.0),
    "GPT2": GPT2,
    "Bert": BERT,
    "Roberta": BERT,
    "Electra": BERT | dict(embedding_size=32, summary_last_dropout=0.0),
    "Albert": BERT | dict(embedding_size=16, classifier_dropout_prob=0.0),
    "XLNet": XLNET,
    "Bart": SEQ2SEQ,
    "Marian": SEQ2SEQ,
    "Pegasus": SEQ2SEQ,
    "Mvp": SEQ2SEQ,
}
HEADS = (
    *("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction", "ForConditionalGeneration"),
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForQuestionAnsweringSimple", "ForMultipleChoice"),
)


def cases(*families: str) -> list[str]:
    import transformers as hf

    return [f"{family}{head}" for family in families for head in HEADS if hasattr(hf, f"{family}{head}")]


def build(kind: str) -> Any:
    import transformers as hf

    family = max((family for family in FAMILIES if kind.startswith(family)), key=len)
    config = getattr(hf, f"{family}Config")(**FAMILIES[family])
    if "QuestionAnswering" in kind or "PreTraining" in kind:
        config.num_labels = 2
    config.classifier_dropout = 0.0
    config.is_decoder = kind.endswith(("ForCausalLM", "LMHeadModel"))
    torch.manual_seed(2)
    model = getattr(hf, kind)(config)
    with torch.no_grad():  # ones and zeros would hide a norm's weight or a bias left out
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 61, (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:], few = 0, torch.tensor([0, 2, 1, 0])
    given: dict[str, Any] = dict(input_ids=ids, attention_mask=mask)
    if "ForSequenceClassification" in kind:
        ends = ids.clone()
        ends[:, -1] = 2  # encoder-decoders look for it
        return given | dict(input_ids=ends, labels=few)
    if "QuestionAnswering" in kind:
        return given | dict(start_positions=few, end_positions=few + 1)
    if "MultipleChoice" in kind:
        return dict(input_ids=ids[:, None].expand(-1, 2, -1).contiguous() - torch.tensor([0, 1])[:, None], labels=few.clamp(max=1))
    if "NextSentence" in kind:
        return given | dict(labels=few.clamp(max=1))
    if kind.startswith("Bert") and "PreTraining" in kind:
        return given | dict(labels=ids, next_sentence_label=few.clamp(max=1))
    if "Electra" in kind and "PreTraining" in kind:
        return given | dict(labels=(ids % 2))
    if "Albert" in kind and "PreTraining" in kind:
        return given | dict(labels=ids, sentence_order_label=few.clamp(max=1))
    return given | dict(labels=ids % 3 if "ForTokenClassification" in kind else ids)


def compared(mesh: Any, kind: str) -> dict[str, float] | str:
    """Errors by what is compared, or the refusal."""
    import gingham

    original = build(kind)
    given = batch(kind)
    try:
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        outputs = [each(**given) for each in (model, original)]
    except (NotImplementedError, gingham.ShapeError) as error:
        return f"{type(error).__name__}: {error}"
    found = {}
    for name, expected in outputs[1].items():
        if isinstance(expected, torch.Tensor):
            found[name] = relative(outputs[0][name], expected)
    assert found
    for output in outputs:
        if output.loss is not None:
            output.loss.backward()
    if outputs[1].loss is not None:
        found["gradients"] = joint_error(plain(model), plain(original))
    return found
