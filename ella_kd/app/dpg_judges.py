"""Who answers DPG-Bench's questions: a VQA model of transformers, a chat model behind a URL, or any callable.

A judge is called with as many pictures as questions and gives an answer for each: a text, or the probability of yes,
0 to 1. Answers of different judges cannot be compared, and none of these is mPLUG-large, with which papers report.
"""

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ella_kd.models.devices import check_device

Judge = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str | float]]

BLIP = "Salesforce/blip-vqa-base"
SUFFIX = " Answer with yes or no only."
AGAIN = (408, 409, 429, 500, 502, 503, 504)  # what a server answers who may be asked again


class TransformersVQA:
    """A visual-question-answering model of transformers: BLIP, which speaks, or ViLT, which chooses among its labels.

    model: an id on the Hugging Face hub or a folder with model and processor. device: as `Pipeline.load` takes it.
    Raises FileNotFoundError where there is none, ValueError for another kind of model.
    """

    def __init__(self, model: str | Path = BLIP, *, device: str | torch.device | None = None) -> None:
        from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

        self.name = Path(model).name if Path(model).is_dir() else str(model)
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            self.model = AutoModelForVisualQuestionAnswering.from_pretrained(model).eval()
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no VQA model {str(model)!r}: expected a folder or an id on the Hugging Face hub; "
                                    f"{str(error).splitlines()[0]}") from error
        if self.model.config.model_type not in ("blip", "vilt"):
            raise ValueError(f"{model} is a {self.model.config.model_type}, and blip and vilt answer here: serve it "
                             "and ask it with --chat, or pass a callable of your own")
        self.device = check_device(device)
        self.model.to(self.device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        answers = [""] * len(questions)
        length = [len(self.processor.tokenizer(question).input_ids) for question in questions]
        # Only questions of one length together: transformers' BLIP attends the padding of shorter ones.
        for _, group in groupby(sorted(range(len(questions)), key=length.__getitem__), key=length.__getitem__):
            rows = list(group)
            given = self.processor(images=[pictures[row].convert("RGB") for row in rows],
                                   text=[questions[row] for row in rows], return_tensors="pt").to(self.device)
            for row, answer in zip(rows, self._answers(given), strict=True):
                answers[row] = answer
        return answers

    def _answers(self, given: Any) -> list[str]:
        if self.model.config.model_type == "vilt":
            return [str(self.model.config.id2label[int(best)]) for best in self.model(**given).logits.argmax(-1)]
        said = self.model.generate(**given, do_sample=False, max_new_tokens=10)
        return [text.strip() for text in self.processor.batch_decode(said, skip_special_tokens=True)]


class ChatVQA:
    """A chat model that sees pictures, behind an OpenAI-compatible endpoint: POST url/chat/completions.

    url: "http://localhost:8000/v1". model: the name that the server knows. key: sent as a bearer token; by default the
    environment's OPENAI_API_KEY, if there is one. A batch is asked at once, in threads. A server that is busy or cannot
    be reached is asked `tries` times, with pauses of wait, 2 wait, ... seconds.
    Raises ConnectionError (an OSError) then, ValueError for what it refuses and for an answer of another form.
    """

    def __init__(self, url: str, model: str, *, key: str | None = None, tries: int = 4, wait: float = 2.0,
                 timeout: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a chat model's URL begins with http:// or https://, got {url!r}")
        if not model:
            raise ValueError("a chat model needs the name that its server knows it by")
        self.url, self.name, self.tries, self.wait, self.timeout = url.rstrip("/"), model, tries, wait, timeout
        self._key = os.environ.get("OPENAI_API_KEY") if key is None else key

    def __call__(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(self._ask, pictures, questions))

    def _ask(self, picture: Image.Image, question: str) -> str:
        shown = BytesIO()
        picture.save(shown, "PNG")
        image = f"data:image/png;base64,{base64.b64encode(shown.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question + SUFFIX}]
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "temperature": 0,
                "max_tokens": 16}
        found = self._post(json.dumps(body).encode())
        try:
            text = json.loads(found)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{self.url} answered without choices[0].message.content: {found[:200]!r}")
        return text

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        for attempt in range(1, self.tries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    answer: bytes = response.read()
                    return answer
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read()[:200].decode(errors='replace')}"
                if error.code not in AGAIN:
                    raise ValueError(f"{self.url} refused a question: {reason}") from error
            except (OSError, HTTPException) as error:  # no connection, a timeout, half an answer
                reason = str(error)
            if attempt < self.tries:
                time.sleep(self.wait * attempt)
        raise ConnectionError(f"{self.url} did not answer {self.tries} times: {reason}")
