"""A batch on many machines: Ray places its shards, starts them again where a worker is lost, and asks for machines.

Each task is `draw_shard`, as on one machine: a shard that is drawn by two, because one of them was thought lost, ends
in the same files.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ella_kd.app.batch import STOP, Batch, Status, status
from ella_kd.app.loading import Models
from ella_kd.app.shards import Interrupted, Shard, device_is_lost, draw_shard

AHEAD = 256  # shards that Ray knows of: enough for it to ask for machines, few enough for a batch of any size
LOSSES = 10  # workers that a shard may take with it, before it is thought to be the shard's fault


def run_on_ray(batch: Batch, models: Models, address: str = "local", *, models_dir: str | Path | None = None,
               cpus: float = 0.5, gpus: float | None = None, retry: bool = False,
               told: Callable[[int], None] = lambda settled: None,
               stop: Callable[[], bool] = lambda: False) -> Status:
    """Draw what is not drawn yet, on a Ray cluster: `Batch.run` on many machines.

    address: "local" for one on this machine, "auto", "ray://host:10001". cpus, gpus: what a worker takes; gpus None:
    one where the cluster has any. All machines see the batch's folder, the models and the pictures under the same
    paths, and have the same version of ella_kd. stop: when it says so, every worker ends after its batch.
    Raises ModuleNotFoundError without Ray, and otherwise as `Batch.run`; in the end ChildProcessError if shards took
    their workers with them again and again.
    """
    ray = _ray()
    with batch.at_work(), _connected(ray, address):
        open_shards, pending, lost = iter(batch.open_shards(retry)), dict[Any, int](), list[int]()
        if gpus is None:
            gpus = float(ray.cluster_resources().get("GPU", 0) >= 1)
        # max_calls: with GPUs Ray ends a worker after each task, and the next one would load the model again
        draw = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=LOSSES, max_calls=0,
                          scheduling_strategy="SPREAD")(_draw)
        where, stopping = Path.cwd(), batch.folder / STOP
        while True:
            while not stopping.exists() and len(pending) < AHEAD and (number := next(open_shards, None)) is not None:
                shard = batch.shard(number)
                pending[draw.remote(shard, models, batch.model(number), where, models_dir, retry)] = number
            if not pending:
                break
            for ref in ray.wait(list(pending), timeout=0.5)[0]:
                number = pending.pop(ref)
                try:
                    if ray.get(ref):
                        told(batch.requests_in(number))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # in its own words
                except ray.exceptions.RayError:
                    lost.append(number)
            if stop():
                stopping.touch()
    if lost:
        raise ChildProcessError(f"the shards {', '.join(map(str, lost))} took their workers with them {LOSSES + 1} "
                                "times, for lack of memory perhaps (see Ray's logs): the same command tries them again")
    return status(batch.folder)


def _draw(shard: Shard, models: Models, model: str, where: Path, models_dir: str | Path | None, retry: bool) -> bool:
    """A task: whether the shard was drawn to its end."""
    os.chdir(where)
    stop = (shard.folder / STOP).exists
    if stop():
        return False
    try:
        draw_shard(shard, models(model), models_dir=models_dir, retry=retry, stop=stop)
    except Interrupted:
        return False
    except RuntimeError as error:
        if device_is_lost(error):
            os._exit(1)  # for Ray: another process gets the shard
        raise
    return True


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A connection to the cluster, unless the caller has one; SIGTERM stays with whoever it belonged to."""
    if ray.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level="warning",
             **({"include_dashboard": False} if address == "local" else {}))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own would end the driver at once
    try:
        yield
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing on many machines needs Ray: pip install 'ella_kd[batch]'", name="ray"
                                  ) from error
    return ray
