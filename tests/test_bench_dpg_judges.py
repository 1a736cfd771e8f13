"""VQA models of transformers as judges, with random weights in the files of the real ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from ella_kd.app.dpg_judges import TransformersVQA

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC] is the car red ? yes no there a".split()
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "white")] * 3
QUESTIONS = sorted(["is the car red ?", "is there a car ? is the car red ?", "is the car ?"] * 3)


def tokenizer(folder: Path) -> Any:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(folder / "vocab.txt"))


def save(folder: Path, model: Any, processor: Any, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * spread
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def test_blip_gives_a_question_the_same_answer_in_any_company(tmp_path: Path) -> None:
    text = {**SMALL, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "projection_dim": 16, "bos_token_id": 5,
            "max_position_embeddings": 32, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**SMALL, "projection_dim": 16, "image_size": 16, "patch_size": 8}
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer(tmp_path))
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    save(tmp_path, model, processor, 1.0, 1)
    judge = TransformersVQA(tmp_path, device="cpu")
    assert judge.name == tmp_path.name

    def answers(pictures: Any, questions: Any, **how: Any) -> list[str]:
        given = processor(images=pictures, text=questions, return_tensors="pt", **how)
        said = processor.batch_decode(model.generate(**given, max_new_tokens=10), skip_special_tokens=True)
        return [each.strip() for each in said]

    alone = [answers(picture, question)[0] for picture, question in zip(PICTURES, QUESTIONS, strict=True)]
    assert judge(PICTURES, QUESTIONS) == alone
    padded = [answers(picture, question, padding="max_length", max_length=16)[0]
              for picture, question in zip(PICTURES, QUESTIONS, strict=True)]
    assert len({*alone}) > 1 and padded != alone  # transformers' BLIP attends the padding


def test_vilt_chooses_among_its_labels(tmp_path: Path) -> None:
    labels = {0: "yes", 1: "no", 2: "2"}
    model = ViltForQuestionAnswering(ViltConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=32,
                                                image_size=32, patch_size=16, id2label=labels,
                                                label2id={name: i for i, name in labels.items()}))
    sides: dict[str, Any] = {"size": {"shortest_edge": 32}, "size_divisor": 16}
    save(tmp_path, model, ViltProcessor(ViltImageProcessorPil(**sides), tokenizer(tmp_path)), 0.5, 7)
    judge = TransformersVQA(tmp_path, device="cpu")
    found = judge(PICTURES, QUESTIONS)
    assert {*found} <= {*labels.values()} and len({*found}) > 1
    assert found == [judge([picture], [question])[0] for picture, question in zip(PICTURES, QUESTIONS, strict=True)]


def test_what_is_no_vqa_model_is_refused(tmp_path: Path) -> None:
    for model in (tmp_path, "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match=r"no VQA model .*expected a folder or an id on the Hugg"):
            TransformersVQA(model, device="cpu")
