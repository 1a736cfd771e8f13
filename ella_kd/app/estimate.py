"""What a batch will take, before it is drawn."""

import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ella_kd.app.batch import Batch
from ella_kd.app.loading import Pipelines
from ella_kd.app.remembered import remembering
from ella_kd.app.shards import Shard, cut, groups
from ella_kd.images import Picture
from ella_kd.jobs import jobs
from ella_kd.request import Request
from ella_kd.samplers import get_sampler


@dataclass(frozen=True)
class Estimate:
    """requests: those that are not drawn yet. rate: pictures a second of the batch that was drawn to know, whose
    requests are like `like`. seconds and size: of all, on this machine; size in bytes."""

    requests: int
    like: Request
    batch: int
    rate: float
    seconds: float
    size: float


def estimate(batch: Batch, pipelines: Pipelines, models_dir: str | Path | None = None) -> Estimate | None:
    """Draws one batch of the commonest kind twice, and reckons by steps, calls a step and pixels; None if all is drawn.
    """
    kinds: Counter[tuple[float, int]] = Counter()
    example: dict[tuple[float, int], int] = {}
    for number in batch.open_shards():
        for request in batch.shard(number).requests:
            kind = _work(request)
            kinds[kind] += 1
            example.setdefault(kind, number)
    if not kinds:
        return None
    commonest = max(kinds, key=lambda kind: kind[0] * kinds[kind])
    number = example[commonest]
    shard, pipeline = batch.shard(number), pipelines(batch.model(number))
    together = max((each for each in cut(shard, groups(shard)) if _work(shard.request(each[0])) == commonest), key=len)
    seconds, size, like = _drawn(shard, together, pipeline, models_dir)
    works = sum(kind[0] * count for kind, count in kinds.items()) / commonest[0]
    pixels = sum(kind[1] * count for kind, count in kinds.items()) / commonest[1]
    return Estimate(sum(kinds.values()), like, len(together), len(together) / seconds,
                    works * seconds / len(together), pixels * size / len(together))


def _work(request: Request) -> tuple[float, int]:
    """What a picture costs, compared with others of the same model, and its pixels or what stands for them."""
    evals = get_sampler(request.sampler).evals
    pixels = (request.width or 512) * (request.height or 512)
    return request.steps * (evals if isinstance(evals, int) else 2) * pixels, pixels


def _drawn(shard: Shard, together: list[int], pipeline: object, models_dir: str | Path | None,
           ) -> tuple[float, int, Request]:
    """Seconds of drawing and saving a batch, the second time; the bytes of its files; a request with its size."""
    system = remembering(pipeline, shard.requests)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            began = time.monotonic()
            for job in jobs(system, [shard.request(i) for i in together], models_dir=models_dir,
                            batch_size=len(together), progress=False):
                for index, picture in enumerate(map(Picture, job.draw(), job.requests)):
                    picture.save(Path(folder) / f"{index}.png", overwrite=True)
            seconds = time.monotonic() - began
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return seconds, size, job.requests[0]
