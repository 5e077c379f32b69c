r"""What `ctpo train` does: a plan, processes, a model, data, rewards, a training that can be continued, and a report.

Everything of a run is kept in its `output_dir`:

=======================  ===============================================================================================
run.json                 settings, versions, fingerprints of model and data: what the run was begun with
initial_model/           the model that "toy" stands for, or what a .gguf file holds
evaluation/before/       what the model could do, see `ctpo.train.evaluation`; likewise evaluation/after
checkpoint-N/            to go on from
traces/, runs/           log-probabilities and logs, where they were asked for
model/                   the trained model, or its adapter, with a card
summary.json             written last: where it is, the run is finished
=======================  ===============================================================================================

The same words lead on from wherever the run was stopped; other settings in the same directory are refused.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ctpo.train._options import Options, Plan, RunConfig, find_accelerate_config, is_toy, parse

if TYPE_CHECKING:
    from ctpo.train.generation import Backend

__all__ = ["RunConfig", "train"]

_log = logging.getLogger(__name__)

RUN, SUMMARY, MODEL, CARD = "run.json", "summary.json", "model", "README.md"
_FORMAT = "ctpo run 1"
_INTERRUPTED = 130
# Set for processes that this command has launched: the file for the status with which they have ended on purpose.
_OURS = "CTPO_LAUNCHED"
# What configurations of mixtures of experts have.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Variables by which launchers tell processes of one another.
_LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
_DISTRIBUTED = (*_LAUNCHED, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")
# What may change between the beginning of a run and its end, besides what `_checkpoints` lists.
_FREE_HERE = ("accelerate_config", "machine_rank", "main_process_ip", "main_process_port", "log_ratio_traces")
_LENGTH = ("max_steps", "num_train_epochs")
_FREE_SCHEDULES = ("constant", "constant_with_warmup")


class _Stopped(Exception):
    """A signal ended the training; what was done is saved."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class _Finished(Exception):
    """There is nothing to do; the text is what is printed."""


def train(words: Sequence[str], *, width: int = 80) -> tuple[str, int]:
    """Do what `ctpo train` does.

    Args:
        words: What follows `ctpo train`: ``--config RECIPE`` and options, see `docs/trainer.md`.
        width: Columns of the terminal.

    Returns:
        The text to print ("" in processes that have nothing to say), and the exit status: 0, or 130 after Ctrl-C.

    Raises:
        ValueError: An option, a file, the model or the data is not what it has to be, or the directory belongs to a
            run with other settings.
        OSError: Something cannot be written.

    Example:
        >>> text, status = train(["--config", "toy", "--dry-run"])
        >>> print(text.splitlines()[0], status)
        ctpo train, recipe toy: a dry run, nothing is trained or written 0
    """
    if not words:
        from ctpo.train._options import recipe_names

        raise ValueError(f"nothing to train: --config {', '.join(recipe_names())} or a YAML file; --help says more")
    with contextlib.redirect_stderr(cast("Any", _Unheard(sys.stderr))), _calm():
        options = parse(words)
        if options.dry_run:
            from ctpo.train._plan import plan_text

            return plan_text(options, width=width), 0
        if not _is_launched() and (status := _launch(options, words)) is not None:
            return "", status
        try:
            with _at_hang_up(lambda: os.kill(os.getpid(), signal.SIGTERM)):
                _end_with_the_launcher()
                return _run(options, width), 0
        except _Finished as finished:
            return str(finished), 0
        except KeyboardInterrupt:
            _note("\nstopped by SIGINT; the same command goes on from there")
            status = _INTERRUPTED
        except _Stopped as stopped:
            status = stopped.status
        if _OURS not in os.environ:
            return "", status
        # To a launcher any status but 0 is a failure, which it describes at length.
        if _rank() == 0:
            Path(os.environ[_OURS]).write_text(str(status), encoding="utf-8")
        return "", 0


# ------------------------------------------------------------------------------------------------------------ processes


def _is_launched() -> bool:
    return any(name in os.environ for name in _LAUNCHED)


def _launch(options: Options, words: Sequence[str]) -> int | None:
    """Launch the processes that were asked for, and return their exit status; None where this process is enough."""
    import torch

    from ctpo.train._plan import processes_of

    run = options.run_config()
    processes = processes_of(run)
    if run.accelerate_config is None and processes == 1:
        visible = torch.cuda.device_count()
        if visible > 1 and not options.given.get("use_cpu"):
            if run.num_processes is None:
                raise ValueError(
                    f"{visible} GPUs are here: say how many processes to train with, --num_processes {visible} or 1"
                )
            # Else transformers would put a copy of the model on every one of them.
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
            os.environ["CUDA_VISIBLE_DEVICES"] = first
        return None
    plan = options.plan(world_size=processes)
    here, needed = torch.cuda.device_count(), -(-processes // run.num_machines)
    if not plan.trainer.use_cpu and here < needed:
        raise ValueError(
            f"{needed} GPUs are needed here, {here} are there: choose num_processes, or look at a --dry-run"
        )
    _check(plan)
    if run.accelerate_config is None and options.given.get("use_cpu"):
        # Accelerate's launcher has processors on one machine by MPI only.
        command = [sys.executable, "-m", "ctpo.train._launcher", "torch"]
        command += [f"--nproc_per_node={processes // run.num_machines}"]
        command += [f"--nnodes={run.num_machines}", f"--node_rank={run.machine_rank}"]
        command += [] if run.main_process_ip is None else [f"--master_addr={run.main_process_ip}"]
        command += ["--standalone"] if run.num_machines == 1 else [f"--master_port={run.main_process_port}"]
    else:
        config = find_accelerate_config(run.accelerate_config or "multi_gpu")
        command = [sys.executable, "-m", "ctpo.train._launcher", "accelerate", f"--config_file={config}"]
        command += [f"--num_processes={processes}", f"--num_machines={run.num_machines}"]
        command += [f"--machine_rank={run.machine_rank}"]
        command += [] if run.main_process_ip is None else [f"--main_process_ip={run.main_process_ip}"]
        command += [] if run.main_process_port is None else [f"--main_process_port={run.main_process_port}"]
    return _watched([*command, "--module", "ctpo", "train", *words])


def _watched(command: Sequence[str]) -> int:
    """Run a launcher; Ctrl-C, SIGTERM and SIGHUP reach the processes that train, each once, which then save and end.

    Launchers would pass on a signal that the terminal has sent to all already, and kill what takes half a minute.
    """
    import fcntl  # not on Windows

    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as told:
        fcntl.flock(told, fcntl.LOCK_EX)  # held as long as this process lives, see `_end_with_the_launcher`
        process = subprocess.Popen(command, env={**os.environ, _OURS: told.name}, start_new_session=True)

        def forward(number: int, _: Any) -> None:
            for worker in _training_processes(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, number)

        former = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with _at_hang_up(lambda: forward(signal.SIGHUP, None)):
                status = process.wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if text := told.read():
            return int(text)
    return status if 0 <= status < 256 else 1


@contextlib.contextmanager
def _at_hang_up(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` when the terminal is closed, at the first SIGHUP only: the system and the shell both send one."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    main = threading.current_thread() is threading.main_thread()
    if hang_up is None or not main or signal.getsignal(hang_up) != signal.SIG_DFL:  # ignored below nohup
        yield
        return

    def handle(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        act()

    signal.signal(hang_up, handle)
    try:
        yield
    finally:
        if signal.getsignal(hang_up) is handle:
            signal.signal(hang_up, signal.SIG_DFL)


class _Unheard:
    """A stream whose reader may have gone, which is no reason to end: a closed terminal, a log that is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _end_with_the_launcher() -> None:
    """Save and end, as at SIGTERM, once the command that has launched this process is gone, however it ended."""
    if _OURS not in os.environ:
        return
    import fcntl

    def wait() -> None:
        with contextlib.suppress(OSError), open(os.environ[_OURS]) as told:
            fcntl.flock(told, fcntl.LOCK_SH)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _training_processes(launcher: int) -> list[int]:
    """The nearest descendants of a launcher that run this command, not what they have started."""
    import psutil  # type: ignore[import-untyped]

    found, waiting = [], [psutil.Process(launcher)]
    while waiting:
        for child in waiting.pop().children():
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "-m" in words and words[words.index("-m") + 1 :][:2] == ["ctpo", "train"]:
                    found.append(child.pid)
                else:
                    waiting.append(child)
    return found


def _check(plan: Plan) -> None:
    """Download what is needed and find mistakes, once, rather than in every process."""
    _check_packages(plan)
    _data(plan)
    _check_names(plan)


def _check_packages(plan: Plan) -> None:
    """Refuse an option whose package is not here, before anything has taken time."""
    from ctpo.train._plan import missing_packages

    for option, package in missing_packages(plan).items():
        raise ValueError(f"{option} needs the package {package}, which is not here: pip install {package}")


def _check_names(plan: Plan) -> None:
    """Whether there are such a model and such rewards."""
    from ctpo.train.rewards import Rewards

    name = str(plan.model.model_name_or_path)
    if not is_toy(name):
        _tokenizer(plan, name)
    Rewards(plan.run.rewards).close()


def _tokenizer(plan: Plan, model: str) -> Any:
    """The tokenizer of a model that can be trained."""
    from huggingface_hub import constants

    from ctpo.train._plan import set_eos
    from ctpo.train.generation import load_tokenizer

    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"model {model!r} is a LoRA adapter; merge it into its base model (merge_and_unload), or give that"
        )
    try:
        tokenizer = load_tokenizer(model)
    except (ValueError, OSError) as error:
        if path.exists() or not constants.HF_HUB_OFFLINE:
            raise
        raise ValueError(f"{error}; HF_HUB_OFFLINE is set, so that nothing is downloaded") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"model {model!r}: its tokenizer has no chat template, which this training needs")
    set_eos(tokenizer, plan.run.eos_token)
    return tokenizer


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Without the bars and remarks of those who load and train models; warnings that concern the user are ours."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # it tells of every attempt to reach the Hub
    if not sys.stderr.isatty():
        import datasets
        from huggingface_hub.utils.tqdm import disable_progress_bars

        datasets.disable_progress_bars()
        disable_progress_bars()
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    ours = logging.getLogger("ctpo")
    ours.addHandler(handler)
    kept, ours.propagate = ours.propagate, False
    try:
        with warnings.catch_warnings():
            # Of TRL and transformers about each other's names, and of torch about what they do.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", module=r"(torch|accelerate|peft|trl|transformers)\.")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        ours.removeHandler(handler)
        ours.propagate = kept


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"! {' '.join(record.getMessage().split())}"


# ------------------------------------------------------------------------------------------------------------ the run


def _run(options: Options, width: int) -> str:
    from ctpo.train._checkpoints import check_writable
    from ctpo.train._report import card, summary_text
    from ctpo.train._run_directory import RunDirectory, read_json

    plan = options.plan()
    if not options.given.get("output_dir"):
        raise ValueError("output_dir is missing: the directory where everything of the run is kept")
    first = _rank() == 0
    output = Path(plan.trainer.output_dir)
    if not first:
        # One voice. What goes wrong in this process alone still ends it, with a traceback.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        logging.getLogger("ctpo").setLevel(logging.ERROR)
    asked, there = plan.run.num_processes, plan.trainer.world_size
    if asked not in (None, there):
        _log.warning(
            "num_processes is %d, but %d were launched: a rollout batch has %d answers",
            asked,
            there,
            plan.trainer.generation_batch_size,
        )
    with contextlib.ExitStack() as stack:
        data = _data(plan, say=True)
        record = _record(plan, data)
        files = None
        with _first_decides():
            if first:
                _check_packages(plan)
                if not (output / SUMMARY).exists():
                    _check_names(plan)
                check_writable(output)
                files = stack.enter_context(RunDirectory(output))
                if (output / RUN).exists():
                    begun = read_json(output / RUN)
                    _refuse_others(output, begun, record)
                    if (output / SUMMARY).exists() and _same_length(begun, record):
                        _note(f"{output} is finished; another output_dir begins anew")
                        raise _Finished(summary_text(read_json(output / SUMMARY), width=width))
                else:
                    _refuse_foreign(output)
                files.write_json(RUN, record)
        model = _initial_model(plan, output)
        with _first_decides():
            prepared = _prepared(plan, model, data) if first else None
        tokenizer, problems = prepared or _prepared(plan, model, data)
        _evaluate(plan, model, "before")
        _note(f"training with {there} process{'es' * (there != 1)}")
        history, steps = _train(plan, model, tokenizer, problems)
        _evaluate(plan, str(output / MODEL), "after")
        if files is None:
            return ""
        summary = _summary(plan, history, steps, len(problems))
        text = card(plan, summary, record["versions"], _hardware(record["machine"]))
        files.write(f"{MODEL}/{CARD}", lambda file: file.write(text.encode()))
        files.write_json(SUMMARY, summary)
        return summary_text(summary, width=width)


def _hardware(machine: Mapping[str, Any]) -> str:
    if machine["accelerator"]:
        return str(machine["accelerator"])
    threads = int(machine["threads"])
    return f"a processor ({machine['processor']}), {threads} thread{'s' * (threads != 1)} a process"


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def _note(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _first_decides() -> Iterator[None]:
    """What ends the first process in here ends all of them; it alone says why."""
    import torch.distributed as distributed

    together = distributed.is_available() and distributed.is_initialized()
    try:
        yield
    except Exception as error:
        if together:
            distributed.broadcast_object_list([0 if isinstance(error, _Finished) else 2], device=_place())
            if isinstance(error, ValueError | OSError):
                print(f"ctpo train: {error}", file=sys.stderr, flush=True)
                raise _Stopped(2) from error
        raise
    if together:
        verdict: list[int | None] = [None]
        distributed.broadcast_object_list(verdict, device=_place())
        if verdict[0] is not None:
            raise _Stopped(verdict[0])


def _place() -> Any:
    """The device that messages between processes go through."""
    import torch

    cuda = torch.cuda.is_available() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _wait() -> None:
    """Until all processes are here, however long one of them evaluates."""
    import datetime

    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        distributed.barrier(group)
        distributed.destroy_process_group(group)


# ------------------------------------------------------------------------------------------------- settings of the run


def _record(plan: Plan, data: Sequence[Any]) -> dict[str, Any]:
    """What the run depends on."""
    from ctpo.train._run_settings import describe_model, digest, machine, plain, versions

    settings: dict[str, Any] = {}
    for part in (plan.run, plan.model, plan.trainer):
        settings |= {own.name: getattr(part, own.name) for own in dataclasses.fields(part)}
    name = str(plan.model.model_name_or_path)
    fingerprint = None if is_toy(name) else describe_model(name)["fingerprint"]
    found: dict[str, Any] = plain(
        {
            "format": _FORMAT,
            "settings": settings,
            "model": {"name": name, "fingerprint": fingerprint},
            "problems": {"count": len(data), "fingerprint": digest([problem.row() for problem in data])},
            "world_size": plan.trainer.world_size,
            "versions": versions(),
            "machine": machine(),
        }
    )
    return found


def _refuse_others(output: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that would be another one from here on."""
    from ctpo.train._checkpoints import FREE, FREE_PREFIXES
    from ctpo.train._run_settings import changes_between

    if begun.get("format") != _FORMAT:
        raise ValueError(f"{output / RUN} was not written by this version of ctpo; choose another output_dir")
    free = set(FREE) | set(_FREE_HERE)
    if now["settings"]["lr_scheduler_type"] in _FREE_SCHEDULES:
        # A run without an end in its schedule may go on beyond it.
        free |= set(_LENGTH)
    own = {entry.name for entry in dataclasses.fields(RunConfig)}  # not free: its "eval_..." belong to the result

    def binding(record: Mapping[str, Any]) -> dict[str, Any]:
        # Not "data": of that name, `changes_between` expects fingerprints.
        return {
            "sources" if name == "data" else name: value
            for name, value in record["settings"].items()
            if name not in free and (name in own or not name.startswith(FREE_PREFIXES))
        }

    kept = binding(begun), binding(now)
    changes = changes_between(*kept, ("there", "now"))
    if begun["problems"] != now["problems"] and not any(change.startswith("sources ") for change in changes):
        changes.append("the problems of data have changed in between")
    if begun["world_size"] != now["world_size"]:
        changes.append(f"{begun['world_size']} processes there, {now['world_size']} now")
    if None not in (prints := [begun["model"]["fingerprint"], now["model"]["fingerprint"]]) and prints[0] != prints[1]:
        changes.append(f"the model {now['model']['name']} has changed in between")
    if changes and _is_bound(output, begun, now):
        raise ValueError(
            f"{output} was begun with other settings: {'; '.join(changes)}. Go on with what it was begun with, or "
            "choose another output_dir"
        )


def _is_bound(output: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether there is anything yet that belongs to the settings that a run was begun with."""
    samples = [path for path in output.glob("evaluation/*/samples.jsonl") if path.stat().st_size]
    other_model = begun["model"]["name"] != now["model"]["name"]
    return bool(
        samples
        or any(output.glob("checkpoint-*"))
        or (output / MODEL).exists()
        or (other_model and (output / "initial_model").exists())
    )


def _same_length(begun: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(begun["settings"][name] == now["settings"][name] for name in _LENGTH)


def _refuse_foreign(output: Path) -> None:
    """Refuse a directory in which something else lies."""
    found = sorted(entry.name for entry in output.iterdir() if not entry.name.startswith("."))
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ValueError(f"output_dir {output} holds {shown}, which no run of ctpo wrote there; choose an empty one")


# ------------------------------------------------------------------------------------------------------- model and data


def _initial_model(plan: Plan, output: Path) -> str:
    """The model's name, or the directory of one that is made here: the toy, or what a .gguf file holds."""
    name = str(plan.model.model_name_or_path)
    toy = is_toy(name)
    if not toy and not Path(name).expanduser().is_file():
        return name
    if toy and plan.trainer.use_cpu:
        import torch

        # More are no faster for so small a model, and much slower where something else has the other cores.
        torch.set_num_threads(1)
    path = output / "initial_model"
    if _rank() == 0 and not path.exists():
        if toy:
            from ctpo.train.toy import make_toy, toy_options

            given = toy_options(name, seed=plan.trainer.seed)
            _note(f"making the toy model in {path}")
            try:
                make_toy(path, **given, progress=_warm_up_progress())
            except KeyboardInterrupt:
                _note("\nstopped by SIGINT; the warm-up begins again with the same command")
                raise _Stopped(_INTERRUPTED) from None
        else:
            _note(f"writing the weights of {name}, no longer quantized, to {path}")
            _dequantize(name, path)
    _wait()
    return str(path)


def _dequantize(name: str, path: Path) -> None:
    """Write what a .gguf file holds as a directory that can be trained."""
    from transformers import AutoModelForCausalLM

    from ctpo.train.generation import load_model

    loaded, tokenizer = load_model(name, dtype="float32", device="cpu")
    # The weights are plain numbers by now, but the model still calls itself quantized and refuses to be saved.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, path)


def _warm_up_progress() -> Callable[[int, int, float], None]:
    terminal = sys.stderr.isatty()

    def show(step: int, steps: int, loss: float) -> None:
        if terminal:
            end = "\n" if step == steps else ""
            print(f"\rwarm-up: step {step} of {steps}, loss {loss:.3f} ", end=end, file=sys.stderr, flush=True)
        elif step % 100 == 0 or step == steps:
            _note(f"warm-up: step {step} of {steps}, loss {loss:.3f}")

    return show


def _data(plan: Plan, *, say: bool = False) -> list[Any]:
    """The problems to train on, those left out that are among the problems of the evaluation."""
    from ctpo.train._plan import load_training_problems, not_held_out

    run = plan.run
    problems = load_training_problems(run, run.data, run.limit).problems
    measured = load_training_problems(run, run.eval_data or [], run.eval_limit).problems
    kept = not_held_out(problems, measured)
    if say and len(kept) < len(problems):
        _log.warning(
            "left out %d of %d problems of data, which are among those of eval_data",
            len(problems) - len(kept),
            len(problems),
        )
    return kept


def _dtype(plan: Plan) -> str:
    return "bfloat16" if plan.trainer.bf16 else "float16" if plan.trainer.fp16 else "float32"


def _short_enough(plan: Plan, tokenizer: Any, problems: list[Any]) -> list[Any]:
    """The problems whose prompts, with what they say of the tool, are not too long."""
    most = plan.run.max_prompt_tokens
    if most is None:
        return problems
    from ctpo.train._plan import tool_form
    from ctpo.train.data import DataError

    form = tool_form(plan, tokenizer)
    lengths = [len(form.prompt_ids(problem.prompt)) for problem in problems]
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= most]
    if not kept:
        raise DataError(f"max_prompt_tokens={most} leaves no problem: the shortest prompt has {min(lengths)}")
    if len(kept) < len(problems):
        _log.warning("left out %d of %d problems: prompts of more than %d tokens", len(problems) - len(kept),
                     len(problems), most)  # fmt: skip
    return kept


# ----------------------------------------------------------------------------------------------------------- evaluation


def _evaluate(plan: Plan, model: str, when: str) -> None:
    """Evaluate a model into OUTPUT_DIR/evaluation/WHEN, if that was asked for; the first process does."""
    if not plan.run.eval_data or (when == "before" and not plan.run.eval_before):
        return
    if _rank() == 0 and not (_is_of(folder := _folder(plan, when), model) and (folder / "results.json").exists()):
        _note(f"evaluating the model {when} the training")
        if plan.trainer.world_size > 1 or plan.trainer.device.type != "cpu":
            _evaluate_apart(plan.options, model, when)
        else:
            try:
                _evaluate_here(plan, model, when)
            except KeyboardInterrupt:
                raise _Stopped(_INTERRUPTED) from None  # it has said so
    _wait()


def _folder(plan: Plan, when: str) -> Path:
    return Path(plan.trainer.output_dir) / "evaluation" / when


def _is_of(folder: Path, model: str) -> bool:
    """Whether an evaluation was begun with this very model, not with what it was before it was trained further."""
    from ctpo.train._run_directory import read_json
    from ctpo.train._run_settings import describe_model

    if not (folder / "settings.json").exists():
        return True
    begun = read_json(folder / "settings.json")["settings"]["model"]["fingerprint"]
    return None in (found := [begun, describe_model(model)["fingerprint"]]) or found[0] == found[1]


def _evaluate_here(plan: Plan, model: str, when: str) -> None:
    from ctpo.train.evaluation import evaluate
    from ctpo.train.generation import Sampling

    run, trainer, folder = plan.run, plan.trainer, _folder(plan, when)
    rounds = trainer.max_tool_calling_iterations
    loading: dict[str, Any] = {
        "columns": run.column_names(),
        "limit": run.eval_limit,
        "system_prompt": run.system_prompt,
        "instruction": run.instruction,
        "on_bad_row": "skip" if run.skip_bad_rows else None,
    }
    with contextlib.ExitStack() as stack:
        evaluate(
            _with_eos(model, run.eos_token, plan) if run.eos_token else model,
            list(run.eval_data or []),
            output=folder,
            overwrite=not _is_of(folder, model),
            samples=run.eval_samples,
            sampling=Sampling(
                run.eval_max_tokens or trainer.max_completion_length, run.eval_temperature, run.eval_top_p
            ),
            tools=trainer.python_tool,
            max_rounds=1000 if rounds is None else rounds,
            sandbox=_sandbox(plan, stack) or "auto",
            rewards=run.rewards,
            seed=run.eval_seed,
            batch_size=run.eval_batch_size,
            chat_template_kwargs=trainer.chat_template_kwargs,
            backend=cast("Backend", run.eval_backend),
            dtype=_dtype(plan),
            device="cpu" if trainer.use_cpu else "auto",
            **{name: value for name, value in loading.items() if value is not None},
        )


def _with_eos(model: str, eos_token: str, plan: Plan) -> Any:
    """A generator whose answers end with that token, too."""
    from ctpo.train._plan import set_eos
    from ctpo.train.generation import open_generator

    run = plan.run
    device = "cpu" if plan.trainer.use_cpu else "auto"
    generator = open_generator(
        model,
        backend=cast("Backend", run.eval_backend),
        batch_size=run.eval_batch_size or 32,
        dtype=_dtype(plan),
        device=device,
    )
    set_eos(generator.tokenizer, eos_token)
    generator.eos_token_ids |= {generator.tokenizer.eos_token_id}
    return generator


def _sandbox(plan: Plan, stack: contextlib.ExitStack) -> Any:
    """Where the tool runs, with the limits of the trainer's settings; None without the tool."""
    trainer = plan.trainer
    if trainer.python_tool == "none":
        return None
    from ctpo.train.sandbox import SandboxUnavailable, open_sandbox

    try:
        return stack.enter_context(open_sandbox(trainer.python_sandbox, limits=trainer.python_limits))
    except SandboxUnavailable as error:
        raise ValueError(str(error)) from None


def _evaluate_apart(options: Options, model: str, when: str) -> None:
    """Evaluate in a process of its own: what it takes of a GPU is given back, and no launcher's variable reaches it."""
    import multiprocessing

    kept = {name: os.environ.pop(name) for name in list(os.environ) if _of_launcher(name)}
    try:
        process = multiprocessing.get_context("spawn").Process(target=_apart, args=(options, model, when))
        process.start()
    finally:
        os.environ.update(kept)
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    if process.exitcode:
        raise ValueError(f"the evaluation ended with status {process.exitcode}, see above")


def _of_launcher(name: str) -> bool:
    return name in _DISTRIBUTED or name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PET_"))


def _apart(options: Options, model: str, when: str) -> None:
    import multiprocessing

    def end_with_the_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, which then ends this
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    status = 0
    with _calm():
        try:
            _evaluate_here(options.plan(), model, when)
        except (ValueError, OSError) as error:
            print(f"ctpo train: {error}", file=sys.stderr)
            status = 2
    sys.exit(status)


# ------------------------------------------------------------------------------------------------------------- training


def _prepared(plan: Plan, model: str, problems: list[Any]) -> tuple[Any, list[Any]]:
    """The model's tokenizer, and the problems that are short enough."""
    args, tokenizer = plan.trainer, _tokenizer(plan, model)
    kept = _short_enough(plan, tokenizer, problems)
    needed = args.generation_batch_size // args.num_generations
    if len(kept) < needed:
        raise ValueError(
            f"data has {len(kept)} problems, a rollout batch needs {needed} prompts (generation_batch_size "
            f"{args.generation_batch_size} / num_generations {args.num_generations}): add data or make it smaller"
        )
    return tokenizer, kept


def _train(plan: Plan, model: str, tokenizer: Any, problems: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """Train from the last checkpoint on; returns what was logged and the number of steps."""
    from ctpo.train._checkpoints import last_checkpoint
    from ctpo.train.rewards import Rewards

    output = Path(plan.trainer.output_dir)
    checkpoint, skipped = last_checkpoint(output)
    for path, reason in skipped:
        _log.warning("%s %s; it is left aside", path, reason)
    with contextlib.ExitStack() as stack:
        rewards = stack.enter_context(Rewards(plan.run.rewards))
        trainer = _trainer(plan, model, tokenizer, problems, rewards.as_trl(), _sandbox(plan, stack))
        resumed = plan.trainer.resume_from_checkpoint or (None if checkpoint is None else str(checkpoint))
        if resumed:
            _note(f"going on from {resumed}")
        try:
            trainer.train(resume_from_checkpoint=resumed)
        except Exception as error:
            raise _clear(error, plan, output) from error
        history, steps = list(trainer.state.log_history), int(trainer.state.global_step)
        if trainer.interrupted_by is not None:
            _note("the same command goes on from there")
            raise _Stopped(128 + int(trainer.interrupted_by))
        if not steps:
            raise ValueError("nothing was trained: the data does not fill a rollout batch, see ctpo train --dry-run")
        try:
            trainer.save_model(str(output / MODEL))
        except Exception as error:
            raise _clear(error, plan, output) from error
        trainer.end()
        del trainer
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _wait()
    return history, steps


def _trainer(
    plan: Plan, model: str, tokenizer: Any, problems: list[Any], reward: Callable[..., list[float]], sandbox: Any
) -> Any:
    from transformers import AutoConfig, PrinterCallback, ProgressCallback
    from transformers.utils import logging as transformers_logging
    from trl import get_peft_config, get_quantization_config

    from ctpo.train._progress import Progress
    from ctpo.train.data import to_dataset
    from ctpo.train.trainer import CTPOTrainer

    args = plan.trainer
    args.model_init_kwargs = {
        "revision": plan.model.model_revision,
        "dtype": plan.model.dtype,
        "attn_implementation": plan.model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    args.disable_tqdm = True
    try:
        if args.world_size > 1 and args.ddp_find_unused_parameters is None:
            # Every parameter has a gradient but those of experts; looking for others costs time, and torch says so.
            config = AutoConfig.from_pretrained(model, revision=plan.model.model_revision).get_text_config()
            args.ddp_find_unused_parameters = any(hasattr(config, name) for name in _EXPERTS)
        trainer = CTPOTrainer(
            model,
            reward_funcs=[reward],
            args=args,
            train_dataset=to_dataset(problems),
            processing_class=tokenizer,
            quantization_config=get_quantization_config(plan.model),
            peft_config=get_peft_config(plan.model),
            sandbox=sandbox,
        )
    except Exception as error:
        raise _clear(error, plan, Path(args.output_dir), f"model {model!r} cannot be trained") from error
    if args.log_level == "passive":
        transformers_logging.set_verbosity_error()  # transformers' trainer has raised it
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    # The first: before anyone prints, it ends its line.
    trainer.callback_handler.callbacks.insert(0, Progress())
    trainer.create_model_card = lambda *_, **__: None  # TRL's, at every checkpoint; ours comes at the end
    return trainer


def _clear(error: Exception, plan: Plan, output: Path, what: str = "") -> Exception:
    """The error in one line, where it is of a kind that is no mistake in a program."""
    text = " ".join(str(error).split())
    before = f"{what}: " if what else ""
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        size = plan.trainer.per_device_train_batch_size
        return ValueError(
            f"out of memory: make per_device_train_batch_size={size} smaller and gradient_accumulation_steps and "
            "steps_per_generation as much larger, or use activation_checkpointing, LoRA (use_peft) or more processes; "
            "ctpo train --dry-run estimates the memory"
        )
    if type(error).__name__ == "DistBackendError" or "Connection closed by peer" in text or "reset by peer" in text:
        return OSError("the connection to another process is lost: it has ended")
    if _from_the_network(error):
        whom = "push_to_hub: the Hub" if plan.trainer.push_to_hub else f"{before}a server"
        return OSError(f"{whom} cannot be reached or refuses: {text}")
    if isinstance(error, OSError) or "No space left" in text or "StorageFull" in text:
        from ctpo.train._checkpoints import last_checkpoint

        last, _ = last_checkpoint(output)
        kept = (
            "" if last is None or "checkpoint" in text else f"; {last} is intact, the same command goes on from there"
        )
        return OSError(f"{before}{text}{kept}")
    if isinstance(error, ModuleNotFoundError):
        return ModuleNotFoundError(f"{before}{text}", name=error.name)
    if isinstance(error, ValueError | ImportError):
        return type(error)(f"{before}{text}")
    return error


def _from_the_network(error: Exception) -> bool:
    """Whether an HTTP client, of which huggingface_hub has had several, has raised it."""
    families = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return not families.isdisjoint(("httpx", "httpx2", "requests"))


def _summary(plan: Plan, history: Sequence[Mapping[str, Any]], steps: int, problems: int) -> dict[str, Any]:
    from ctpo.train._plan import rollout_batches
    from ctpo.train._report import summarize
    from ctpo.train._run_directory import read_json
    from ctpo.train.evaluation import compare

    folders = {when: _folder(plan, when) for when in ("before", "after")}
    finished = {when: folder for when, folder in folders.items() if (folder / "results.json").exists()}
    return summarize(
        history=history,
        steps=steps,
        rollout_batches=rollout_batches(plan.trainer, problems, steps) or 0,
        processes=plan.trainer.world_size,
        output_dir=Path(plan.trainer.output_dir),
        evaluations={when: read_json(folder / "results.json") for when, folder in finished.items()},
        comparison=compare(*finished.values()) if len(finished) == 2 else None,
    )
