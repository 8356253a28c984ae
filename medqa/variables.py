"""Environment variables that other programs read, in one table: whether each one has an effect on a run.

Accelerate reads about a hundred variables, some of which override a program's own arguments, and `accelerate launch`
sets them from a configuration file that its user may have forgotten. torch, transformers and the libraries below them
read more. No computed value may depend on one of them silently, so the table gives each variable one of the kinds in
`Kind`. `tests/test_variables.py` compares the table with the source of the installed Accelerate.

Variables of torch.compile (TORCH_COMPILE*, TORCHDYNAMO_*, TORCHINDUCTOR_*) are not in the table: nothing is compiled.
"""

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum

TRUE = ("1", "true", "yes", "y", "t", "on")
FALSE = ("0", "false", "no", "n", "f", "off")


class Kind(Enum):
    """What is done with a variable."""

    KEPT = "kept: the launcher needs it, or it changes no computed value"
    FLAG = "kept, and refused if its value is neither true nor false"
    TOLD = "kept, and has no effect: the experiment's value is passed explicitly"
    CLEARED = "removed from the environment: the experiment decides, or nothing here reads it"
    REFUSED = "requests a computation that is not supported"
    RECORDED = "selects among kernels that differ in the last digits: kept, and recorded in checkpoints"


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        advice: for `TOLD` and `CLEARED`, what decides instead (empty: nothing is reported); for `REFUSED`, what to do.
        harmless: values, in lower case, that request what is done anyway.
        device: the only device whose values it changes (`cpu` or `cuda`); None if it affects all devices.
    """

    kind: Kind
    advice: str = ""
    harmless: tuple[str, ...] = FALSE
    device: str | None = None


SEVERAL = "`torchrun --nproc_per_node N train.py ...` or `accelerate launch --multi_gpu --num_processes N train.py ...`"
LAUNCHER = "remove it from the launcher's configuration (`accelerate env` shows the file)"
FLOAT32 = "it would compute float32 in a lower precision; model.dtype and training.mixed_precision decide"

# A name that ends with `_` is a prefix; the longest matching prefix counts.
TABLE = {
    # Accelerate: what the launcher decides.
    "ACCELERATE_USE_CPU": Rule(Kind.FLAG),  # as --cpu: `medqa/model/settings.py`
    "ACCELERATE_USE_FSDP": Rule(Kind.FLAG),  # both: `shards_from_launcher` in `medqa/training/distributed.py`
    "FSDP_": Rule(Kind.KEPT),
    "ACCELERATE_CPU_AFFINITY": Rule(Kind.FLAG),
    "ACCELERATE_DEBUG_MODE": Rule(Kind.FLAG),
    "ACCELERATE_DEBUG_RDV_FILE": Rule(Kind.KEPT),
    "ACCELERATE_LOG_LEVEL": Rule(Kind.KEPT),
    "ACCELERATE_ENABLE_RICH": Rule(Kind.KEPT),
    "ACCELERATE_NUM_PROCESSES": Rule(Kind.KEPT),  # of Accelerate's own tests
    "FORK_LAUNCHED": Rule(Kind.FLAG),
    # Accelerate: what the experiment decides.
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(
        Kind.CLEARED, "training.global_batch_size and training.per_device_batch_size decide", ("1",)
    ),
    "ACCELERATE_GRADIENT_CLIPPING": Rule(Kind.CLEARED, "optimizer.max_grad_norm decides"),
    "ACCELERATE_MIXED_PRECISION": Rule(Kind.TOLD, "training.mixed_precision decides"),  # kept: `Stopper` looks at it
    "ACCELERATE_DYNAMO_": Rule(Kind.CLEARED),
    "ACCELERATE_DYNAMO_BACKEND": Rule(Kind.CLEARED, "models are not compiled"),
    # Accelerate: what is not done here.
    "ACCELERATE_USE_DEEPSPEED": Rule(Kind.REFUSED, f"DeepSpeed is not supported; {LAUNCHER}"),
    "ACCELERATE_USE_MEGATRON_LM": Rule(Kind.REFUSED, f"Megatron-LM is not supported; {LAUNCHER}"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Rule(
        Kind.REFUSED, f"parallelism_config: weights are shared out among all processes; {LAUNCHER}"
    ),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": Rule(
        Kind.REFUSED, "SageMaker's own distribution is not supported; use distributed_type NO"
    ),
    "ACCELERATE_TORCH_DEVICE": Rule(Kind.REFUSED, "choose the device with CUDA_VISIBLE_DEVICES, or with --cpu", ()),
    # Accelerate: the details of what is refused, and what only matters where it is not.
    "ACCELERATE_DEEPSPEED_": Rule(Kind.CLEARED),
    "ACCELERATE_CONFIG_DS_FIELDS": Rule(Kind.CLEARED),
    "ACCELERATE_USE_SAGEMAKER": Rule(Kind.CLEARED),
    "ACCELERATE_FP8_": Rule(Kind.CLEARED),
    "ACCELERATE_DOWNCAST_BF16": Rule(Kind.CLEARED),  # of TPUs
    "ACCELERATE_ALLOW_CP_STANDALONE": Rule(Kind.CLEARED),
    "ACCELERATE_BYPASS_DEVICE_MAP": Rule(Kind.CLEARED),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": Rule(Kind.CLEARED),
    "ACCELERATE_": Rule(Kind.CLEARED, "it is not known here"),  # of another version
    "MEGATRON_LM_": Rule(Kind.CLEARED),
    "PARALLELISM_CONFIG_": Rule(Kind.CLEARED),
    # torch and the libraries below it.
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Rule(Kind.TOLD),  # NVIDIA's containers set it: `settle_variables` undoes it
    "ONEDNN_DEFAULT_FPMATH_MODE": Rule(Kind.REFUSED, FLOAT32, ("strict",), "cpu"),
    "DNNL_DEFAULT_FPMATH_MODE": Rule(Kind.REFUSED, FLOAT32, ("strict",), "cpu"),
    "NVIDIA_TF32_OVERRIDE": Rule(Kind.REFUSED, FLOAT32, ("0",), "cuda"),
    "ONEDNN_MAX_CPU_ISA": Rule(Kind.RECORDED),
    "DNNL_MAX_CPU_ISA": Rule(Kind.RECORDED),
    "MKL_CBWR": Rule(Kind.RECORDED),
    "MKL_ENABLE_INSTRUCTIONS": Rule(Kind.RECORDED),
    "TORCH_MKLDNN_MATMUL_": Rule(Kind.RECORDED),
    "TORCH_LINEAR_FLATTEN_3D": Rule(Kind.RECORDED),
    "TORCH_BLAS_PREFER_": Rule(Kind.RECORDED),
    "TORCH_LINALG_PREFER_": Rule(Kind.RECORDED),
    "TORCH_CUDNN_": Rule(Kind.RECORDED),
    "TORCH_ROCM_": Rule(Kind.RECORDED),
    "DISABLE_ADDMM_CUDA_LT": Rule(Kind.RECORDED),
    "CUBLAS_EMULATE_SINGLE_PRECISION": Rule(Kind.RECORDED),
    "CUBLAS_EMULATION_STRATEGY": Rule(Kind.RECORDED),
    "PYTORCH_TUNABLEOP_ENABLED": Rule(Kind.RECORDED),
    "NCCL_ALGO": Rule(Kind.RECORDED),
    "NCCL_PROTO": Rule(Kind.RECORDED),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": Rule(Kind.CLEARED, "nothing that is loaded may run code"),
    # transformers and bitsandbytes.
    "TRANSFORMERS_SDPA_FORCE_GQA": Rule(Kind.RECORDED),
    "FLASH_ATTENTION_DETERMINISTIC": Rule(Kind.RECORDED),
    "BNB_CUDA_VERSION": Rule(Kind.RECORDED),
    "BNB_ROCM_VERSION": Rule(Kind.RECORDED),
}

# Variables by which a launcher of several processes tells each process its rank.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# On CPUs, Accelerate takes from these what RANKS do not say.
MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")

# Libraries parse these when they are imported; a wrong value would end in a traceback.
PARSED_AT_IMPORT = {
    "ACCELERATE_LOG_LEVEL": r"(?i)debug|info|warning|warn|error|critical|fatal|notset",
    "ACCELERATE_ENABLE_RICH": f"(?i){'|'.join(TRUE + FALSE)}",
    "HF_HUB_ETAG_TIMEOUT": r"\d+",
    "HF_HUB_DOWNLOAD_TIMEOUT": r"\d+",
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": r"\d+(\.\d*)?",
}
PREPARED: list[tuple[str, str]] = []  # messages of `prepare_imports`


def rule_of(name: str) -> Rule | None:
    """The row of the table for a variable; None if it has none."""
    if name in TABLE:
        return TABLE[name]
    prefixes = [prefix for prefix in TABLE if prefix.endswith("_") and name.startswith(prefix)]
    return TABLE[max(prefixes, key=len)] if prefixes else None


def settle_variables(
    environment: MutableMapping[str, str] = os.environ, *, devices: Sequence[str] = (), refuse: bool = True
) -> list[tuple[str, str]]:
    """Apply the table to the environment, and return lines for the printed plan about variables without effect.

    A second call changes nothing.

    Args:
        devices: the devices that may be used, as far as they are known; `make_accelerator` knows the one that is used.
        refuse: whether computed values may depend on the environment; if not, nothing is refused.

    Raises:
        UserError: variables that request an unsupported computation, have no valid value, or are left from a launcher.
    """
    import torch  # not at the top: `prepare_imports` comes before all other imports

    from medqa.errors import UserError

    problems, ignored = [], list(PREPARED)
    for name in sorted(environment):
        rule, value = rule_of(name), environment[name].strip()
        if rule is None:
            continue
        asks = value.lower() not in ("", *rule.harmless)
        elsewhere = rule.device is not None and rule.device not in devices
        if rule.kind is Kind.REFUSED and asks and not elsewhere:
            problems.append(f"{name}={value}: {rule.advice}; or `unset {name}`")
        elif rule.kind is Kind.FLAG and value.lower() not in ("", *TRUE, *FALSE):
            problems.append(f"{name}={value}: neither true nor false; correct it, or `unset {name}`")
        elif rule.kind in (Kind.CLEARED, Kind.TOLD) and rule.advice and asks:
            ignored.append(("no effect", f"{name}={value}: {rule.advice}"))
        if rule.kind is Kind.CLEARED or not value:
            del environment[name]
    problems += _problems_of_ranks(environment)
    if problems and refuse:
        raise UserError(*problems)
    torch.set_float32_matmul_precision("highest")
    return ignored


def is_on(name: str) -> bool:
    """Whether a boolean variable is set to true."""
    return os.environ.get(name, "").strip().lower() in TRUE


def recorded_variables() -> dict[str, str]:
    """The variables of kind `RECORDED` that are set."""
    found = {name: rule_of(name) for name in sorted(os.environ)}
    return {name: os.environ[name] for name, rule in found.items() if rule and rule.kind is Kind.RECORDED}


def read_by_accelerate() -> list[str]:
    """The names of set variables about processes and Accelerate, for a message about a failed start."""
    names, prefixes = (*RANKS, *MEETING, "OMP_NUM_THREADS"), ("ACCELERATE_", *MPI)
    return [name for name in sorted(os.environ) if name in names or name.startswith(prefixes)]


def _problems_of_ranks(environment: MutableMapping[str, str]) -> list[str]:
    """Describe what is wrong with the variables by which a launcher tells a process its rank.

    If something is wrong they are removed, so that this process, which has to report it, does not wait for others.
    """
    for name in RANKS:
        if not environment.get(name, "-").strip():  # a script may export an empty value
            del environment[name]
    if environment.get("LOCAL_RANK") == "-1":  # by convention: not launched
        del environment["LOCAL_RANK"]
    present = [name for name in RANKS if name in environment]
    said = ", ".join(f"{name}={environment[name]}" for name in present)
    missing = [name for name in (*RANKS, *MEETING) if not environment.get(name)]
    try:
        number = {name: int(environment[name]) for name in present}
        if number.get("LOCAL_RANK") is None and number.get("WORLD_SIZE", 1) == 1 and number.get("RANK", 0) == 0:
            return []  # not launched; a cluster may set RANK=0 and WORLD_SIZE=1 for a single process
        if missing:
            wrong = f"without {', '.join(missing)}"
        elif number["LOCAL_RANK"] < 0 or not 0 <= number["RANK"] < number["WORLD_SIZE"]:
            wrong = "which are inconsistent"
        else:
            if number == dict(zip(RANKS, (0, 0, 1), strict=True)) and "TORCHELASTIC_RUN_ID" not in environment:
                del environment["LOCAL_RANK"]  # a single process must not wait for others at an outdated address
            return []
    except ValueError:
        wrong = "of which one is not an integer"
    for name in present:
        del environment[name]
    return [
        f"the environment has {said}, {wrong}: left by another program? `unset {' '.join(present)}` to train in one "
        f"process; for several use {SEVERAL}, which set all of them"
    ]


def prepare_imports() -> None:
    """Prepare the environment before other libraries are imported; called by `medqa/__init__.py`.

    Without a home directory (a user id without an entry in the password file, no HOME), libraries fail, or create a
    directory named `~`. Their caches are then put into a directory of this user below the temporary directory.
    """
    os.environ["USE_TORCH_XLA"] = "0"  # otherwise Accelerate and transformers would use torch_xla if it is installed
    for name, form in PARSED_AT_IMPORT.items():
        value = os.environ.get(name)
        if value and not re.fullmatch(form, value):
            del os.environ[name]
            PREPARED.append(("no effect", f"{name}={value}: not a valid value"))
    if os.path.expanduser("~") == "~":
        with contextlib.suppress(OSError):
            os.environ["HOME"] = _own_temporary_directory()
            PREPARED.append(("no home", f"HOME is not set: caches are in {os.environ['HOME']}"))


def _own_temporary_directory() -> str:
    """The same directory at each call, unless another user has created it."""
    path = os.path.join(tempfile.gettempdir(), f"medqa-home-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return path if ours else tempfile.mkdtemp(prefix="medqa-home-")
