"""paraphrase-MiniLM-L3 (BERT of 3 layers of 384, 17.2 M parameters): similarity of words, and retrieval.

The tokenizer is that of the demo's model, which is the same. Calibrated on questions and passages of BoolQ that the
retrieval does not use. Needs `onnx` and `scipy`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from quality import assets
from quality.onnx_weights import OnnxWeights
from quality.subject import Scores, Subject
from tcompress.demo.assets import BOOLQ, MINILM, WORDSIM353, boolq
from tcompress.demo.sentence_encoder import SentenceEncoder
from tcompress.demo.tasks import boolq_retrieval, wordsim353_spearman

#: Pairs of BoolQ that the retrieval uses.
_QUESTIONS = 300


def load_model(file: Path) -> nn.Module:
    """The encoder of the ONNX file as `transformers.BertModel` without a pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=3, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(config, add_pooling_layer=False)
    state = OnnxWeights(file, "model.0.auto_model.").named
    state = {name: tensor for name, tensor in state.items() if name != "embeddings.position_ids"}
    model.load_state_dict(state)
    return model.eval()


def subject(calibration: int = 64) -> Subject:
    """The model, with the demo's two metrics."""
    from transformers import AutoTokenizer

    for asset in (WORDSIM353, BOOLQ):
        assets.wheel_files(asset)
    tokenizer = AutoTokenizer.from_pretrained(assets.wheel_files(MINILM), local_files_only=True)
    model = load_model(assets.wheel_files(assets.MINILM_L3) / "paraphrase-MiniLM-L3-v2.onnx")
    questions = [question for question, _ in boolq(_QUESTIONS)]

    def evaluate(compressed: nn.Module) -> Scores:
        encoder = SentenceEncoder(compressed, tokenizer)
        metric = wordsim353_spearman(encoder).value
        return Scores(metric, encoder(questions), {"BoolQ R@1": boolq_retrieval(encoder, _QUESTIONS).value})

    texts = [text for pair in boolq(None)[1000 : 1000 + calibration // 2] for text in pair]
    samples = [dict(tokenizer(text, truncation=True, max_length=128, return_tensors="pt")) for text in texts]
    return Subject(
        name="paraphrase-MiniLM-L3",
        model=model,
        calibration=samples,
        evaluate=evaluate,
        metric="WordSim353, Spearman's ρ",
        counted=f"353 pairs; outputs of {_QUESTIONS} questions; calibration {len(texts)} texts",
    )
