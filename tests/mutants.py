"""Plants small faults in the source, one at a time, and counts how many of them the tests notice.

    make mutants                                          300 faults from seed 0
    make mutants ARGS="--only samplers/lms.py --count 20"

Prints a table by folder and the survivors, and writes out/mutants.json. A fault is tried on the tests that run its
line: the quickest case of each test function first, then their other cases, within --tests and --seconds. Which test
runs which line is recorded once for each state of the tree, in out/mutants_*/. Every trial is a fork of a process that
has collected all tests and in which the changed functions get their new code; what acts during the import, and would
survive so, is tried again in a fork that imports ella_kd anew. No file is changed. Tests in subprocesses do not count.
"""

import argparse
import ast
import gc
import hashlib
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.machinery import SourceFileLoader
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from coverage import Coverage

from mutations import Site, mutated, sites, statements

TARGETS = ["samplers/*.py", "ella_kd/conditioning/*.py", "ella_kd/guidance/*.py", "ella_kd/denoiser*.py",
           "ella_kd/bound*.py", "models/files/*.py"]
PRELOAD = ["torch", "torch.testing", "transformers", "diffusers", "scipy.stats", "scipy.integrate", "torchsde",
           "torchdiffeq", "matplotlib.figure", "PIL.Image", "click.testing", "anyio.pytest_plugin",
           "_hypothesis_pytestplugin", "hypothesis.internal.conjecture.engine"]
ANEW = "only an import would show it"
FOREVER = float("inf")
Items = dict[str, pytest.Item]


# Whatever runs a test does so in a fork.

def forks(tasks: Iterable[tuple[Any, Callable[[], Any], float]], jobs: int = 1) -> Iterator[tuple[Any, Any, float]]:
    """(key, answer, seconds) of each (key, work, CPU seconds allowed). An error of work is answered as its text, the
    end of its time (or ten times as long by the clock) as "timeout"."""
    tasks, folder = iter(tasks), Path(tempfile.mkdtemp())
    running: dict[int, tuple[Any, float, float]] = {}
    waiting = True
    while waiting or running:
        while waiting and len(running) < jobs:
            if (task := next(tasks, None)) is None:
                waiting = False
            elif pid := os.fork():
                running[pid] = task[0], time.monotonic(), task[2]
            else:
                child(folder, *task[1:])
        time.sleep(0.005)
        for pid, (key, start, allowed) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() > start + 10 * allowed:
                os.killpg(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0)
            if ended:
                del running[pid]
                answer = "timeout" if os.WIFSIGNALED(status) else pickle.loads((folder / str(pid)).read_bytes())
                yield key, answer, time.monotonic() - start
    shutil.rmtree(folder)


def child(folder: Path, work: Callable[[], Any], allowed: float) -> None:
    os.setpgid(0, 0)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    if allowed < FOREVER:
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(allowed) + 1, int(allowed) + 2))
    try:
        answer = work()
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"[:300]
    (folder / str(os.getpid())).write_bytes(pickle.dumps(answer))
    os._exit(0)


def once(work: Callable[[], Any]) -> Any:
    [(_, answer, _)] = forks([(0, work, FOREVER)])
    return answer


class Loop:
    """A pytest plugin that hands the collected tests to a function."""

    answer: Any = "the collection of tests"

    def __init__(self, run: Callable[[Items], Any]) -> None:
        self.run = run

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not session.testsfailed:
            self.answer = self.run({item.nodeid: item for item in session.items})
        return True


def collected(test_files: Iterable[str], run: Callable[[Items], Any]) -> Any:
    loop = Loop(run)
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *test_files], plugins=[loop])
    return loop.answer


def outcomes(items: Items, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Runs the named tests in this order: (name, it has failed). Hypothesis' complaint of slowness is no failure."""
    chosen = [items[name] for name in names if name in items]
    for item, following in zip(chosen, [*chosen[1:], None]):
        reports = runtestprotocol(item, log=False, nextitem=following)
        yield item.nodeid, any(r.failed and "FailedHealthCheck" not in str(r.longrepr) for r in reports)


# Which test runs which line.

def recorded(targets: list[str], test_files: list[str], folder: Path, jobs: int) -> dict[str, Any]:
    """tests: CPU seconds of each that passes; lines: {file: {line: names of the tests}}, "" for outside of tests."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {file: folder / f"{Path(file).stem}.pickle" for file in test_files}
    coverage = Coverage(data_file=None, config_file=False, include=targets)

    def serve(items: Items) -> bool:
        todo = [(file, lambda file=file: traced(coverage, targets, items, file), FOREVER)
                for file, part in parts.items() if not part.exists()]
        for file, part, _ in forks(todo, jobs):
            if isinstance(part, str):
                raise RuntimeError(f"{file}: {part}")
            parts[file].write_bytes(pickle.dumps(part))
            say(f"{sum(part[0].values()):6.1f} s, {len(part[0])} tests of {file}")
        return True

    def work() -> Any:
        coverage.start()
        return collected(test_files, serve)

    if not all(part.exists() for part in parts.values()) and (answer := once(work)) is not True:
        raise SystemExit(f"the tests could not be recorded: {answer}")
    merged: dict[str, Any] = {"tests": {}, "lines": {file: defaultdict(set) for file in targets}}
    for part in parts.values():
        tests, ran = pickle.loads(part.read_bytes())
        merged["tests"] |= tests
        for file, lines in ran.items():
            for line, names in lines.items():
                merged["lines"][file][line].update(name for name in names if not name or name in tests)
    return merged


def traced(coverage: Coverage, targets: list[str], items: Items, file: str) -> Any:
    """({test: CPU seconds}, {file: {line: tests}}) of one test file."""
    seconds = {}
    trial = outcomes(items, [name for name in items if name.split("::")[0] == file])
    for name in [name for name in items if name.split("::")[0] == file]:
        coverage.switch_context(name)
        start = time.process_time()
        if next(trial)[1]:
            say(f"left out, it does not pass here: {name}")
        else:
            seconds[name] = time.process_time() - start
    coverage.stop()
    return seconds, {target: coverage.get_data().contexts_by_lineno(os.path.abspath(target)) for target in targets}


def choose(names: set[str], durations: dict[str, float], most: int, seconds: float) -> list[str]:
    """The quickest of each test function, then the second quickest of each, ...: within most and seconds."""
    functions = defaultdict(list)
    for name in sorted(names, key=lambda name: (durations[name], name)):
        functions[name.split("[")[0]].append(name)
    chosen: list[str] = []
    for name in (name for turn in zip_longest(*functions.values()) for name in turn if name):
        seconds -= durations[name]
        if len(chosen) == most or (chosen and seconds < 0):
            break
        chosen.append(name)
    return chosen


# One fault, and all of them.

class Mutant:
    def __init__(self, file: str, number: int, site: Site, covered: dict[str, Any], options: Any) -> None:
        self.file, self.path, self.source = file, os.path.abspath(file), Path(file).read_text()
        self.line, self.change = site.old.lineno, str(site)
        self.code = compile(mutated(self.source, number), self.path, "exec")
        lines = covered["lines"][file]
        node, statement = (set().union(*(lines.get(n, ()) for n in span)) for span in site.lines())
        names = node or statement
        self.imported = not site.called or "" in names
        if self.imported:  # any test that enters the file may see it
            names = names.union(*lines.values())
        self.covering = len(names - {""})
        self.tests = choose(names - {""}, covered["tests"], options.tests, options.seconds)
        self.allowed = 15 + 4 * sum(covered["tests"][test] for test in self.tests)

    def found(self, items: Items) -> str:
        """The first test that fails, or ""."""
        return next((name for name, failed in outcomes(items, self.tests) if failed), "")

    def found_alive(self, items: Items, alive: dict[str, list[FunctionType]]) -> str:
        if not exchange(compile(self.source, self.path, "exec"), self.code, alive[self.path]):
            return ANEW
        return self.found(items) or (ANEW if self.imported else "")

    def found_anew(self) -> str:
        get_code = SourceFileLoader.get_code

        def changed(loader: Any, name: str) -> Any:
            return self.code if os.path.abspath(loader.path) == self.path else get_code(loader, name)

        SourceFileLoader.get_code = changed  # type: ignore[assignment, method-assign]
        return collected(sorted({test.split("::")[0] for test in self.tests}), self.found)


def exchange(old: CodeType, new: CodeType, functions: list[FunctionType]) -> int:
    """Gives the functions whose code has changed the new one; how many that are."""
    count = 0
    for before, after in zip(old.co_consts, new.co_consts):
        if isinstance(before, CodeType) and isinstance(after, CodeType) and before != after:
            count += exchange(before, after, functions)
            for function in functions:
                if function.__code__ == before:
                    function.__code__ = after
                    count += 1
    return count


def tried(mutants: list[Mutant], test_files: list[str], jobs: int) -> dict[Mutant, str]:
    """What found each: the name of a test, "timeout", or "" for nothing."""
    answers = dict.fromkeys(mutants, "")
    numbers = [k for k, mutant in enumerate(mutants) if mutant.tests]

    def serve(items: Items) -> list[tuple[int, str]]:
        alive = defaultdict(list)
        for function in [thing for thing in gc.get_objects() if type(thing) is FunctionType]:
            alive[function.__code__.co_filename].append(function)
        return tell((k, partial(mutants[k].found_alive, items, alive), mutants[k].allowed) for k in numbers)

    def tell(tasks: Iterable[tuple[int, Callable[[], str], float]]) -> list[tuple[int, str]]:
        told = []
        for k, answer, seconds in forks(tasks, jobs):
            say(f"{seconds:5.1f} s {mutants[k].file}:{mutants[k].line}  {mutants[k].change}: {answer or 'SURVIVED'}")
            told.append((k, answer))
        return told

    first = once(lambda: collected(test_files, serve))
    second = tell((k, mutants[k].found_anew, mutants[k].allowed) for k, answer in first if answer == ANEW)
    return answers | {mutants[k]: answer for k, answer in [*first, *second]}


def drawn(files: list[str], count: int, seed: int) -> Iterator[tuple[str, int, Site]]:
    """count faults, spread over the files by their logical lines."""
    trees = {file: ast.parse(Path(file).read_text()) for file in files}
    total, lines = sum(map(statements, trees.values())), 0
    for file, tree in trees.items():
        before, lines = lines, lines + statements(tree)
        possible = list(enumerate(sites(tree)))
        quota = min(round(lines * count / total) - round(before * count / total), len(possible))
        chosen = random.Random(f"{seed} {file}").sample(possible, quota)
        yield from ((file, *one) for one in sorted(chosen, key=itemgetter(0)))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=TARGETS, metavar="GLOB", help="the files to change")
    parser.add_argument("--test-files", nargs="+", default=["tests/test_*.py"], metavar="GLOB")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tests", type=int, default=150, help="tried on one fault at most")
    parser.add_argument("--seconds", type=float, default=20, help="of CPU time for the tests tried on one fault")
    parser.add_argument("--preload", nargs="*", default=PRELOAD, help="modules imported once, before any fork")
    parser.add_argument("--out", type=Path, default="out/mutants.json")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, os.getcwd())
    for name in options.preload:
        importlib.import_module(name)
    only, targets, test_files = (
        list(dict.fromkeys(str(path) for pattern in patterns for path in sorted(Path().glob(pattern))))
        for patterns in (options.only, [*TARGETS, *options.only], options.test_files))
    state = hashlib.sha256(" ".join(targets).encode())
    for path in sorted(path for file in [*targets, *test_files] for path in Path(file).parent.glob("*.py")):
        state.update(b"" if path.stem in ("mutants", "mutations", "test_mutants") else path.read_bytes())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    covered = recorded(targets, test_files, options.out.parent / f"mutants_{state.hexdigest()[:12]}", options.jobs)
    mutants = [Mutant(*one, covered, options) for one in drawn(only, options.count, options.seed)]
    answers = tried(mutants, test_files, options.jobs)
    finders = sorted({answer for answer in answers.values() if "::" in answer})
    unsound = once(lambda: collected(test_files, lambda items: [n for n, failed in outcomes(items, finders) if failed]))
    report(answers, unsound, options)


def report(answers: dict[Mutant, str], unsound: list[str], options: argparse.Namespace) -> None:
    how = {m: "survived" if answer in ["", *unsound] else "timeout" if answer == "timeout" else "killed"
           for m, answer in answers.items()}
    rows: list[dict[str, Any]] = []
    for folder in [*sorted({str(Path(m.file).parent) for m in how}), "all"]:
        of = [how[m] for m in how if folder in (str(Path(m.file).parent), "all")]
        rows.append({"folder": folder, "mutants": len(of), "killed": of.count("killed"),
                     "survived": of.count("survived"), "timeouts": of.count("timeout"),
                     "killed share": f"{1 - of.count('survived') / len(of):.1%}"})
    for row in [dict(zip(rows[0], rows[0])), dict.fromkeys(rows[0], "---"), *rows]:
        print("|", " | ".join(map(str, row.values())), "|")
    print(f"\n{sum(len(m.tests) < m.covering for m in how)} of them are run by more tests than were tried: at most "
          f"{options.tests}, or {options.seconds:g} s of CPU time.\n"
          f"Tests that fail without a fault: {unsound or 'none'}.")
    for m in how:
        if how[m] == "survived":
            print(f"\n{m.file}:{m.line}  {m.source.splitlines()[m.line - 1].strip()}\n    {m.change}    "
                  f"({len(m.tests)} of {m.covering} tests tried)")
    options.out.write_text(json.dumps({
        "seed": options.seed, "tests": options.tests, "seconds": options.seconds, "unsound": unsound, "folders": rows,
        "mutants": [{"file": m.file, "line": m.line, "change": m.change, "outcome": how[m], "found_by": answer,
                     "tried": len(m.tests), "covering": m.covering} for m, answer in answers.items()]}, indent=1))


if __name__ == "__main__":
    main()
