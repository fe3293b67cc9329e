"""The private Ray names and environment variables that `orchestrate/` relies on; no Ray is started."""

from __future__ import annotations

import inspect
import mmap
from dataclasses import fields
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.collective
import ray.train.constants
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from ray.job_submission import JobSubmissionClient
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata, Worker
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError

from dist_ft.config import Config
from dist_ft.errors import UsageError
from dist_ft.messages import CoordinatorAddress
from dist_ft.orchestrate.workers.ray_group import TRAIN_ENV, ElasticTrainer, GroupSettings, make_trainer, start_env
from dist_ft.orchestrate.workers.ray_version import SERIES, check_ray_version
from dist_ft.orchestrate.workers.scaling import AskCoordinator, ElasticPolicy

TRAINER = "src/dist_ft/orchestrate/workers/ray_group.py"
CLUSTER = "src/dist_ft/orchestrate/driver/connect.py"


def _needed(what: str, by: str) -> str:
    return f"Ray {ray.__version__} has no {what} any more; {by} depends on it"


WHERE = CoordinatorAddress("c", "n", "s")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ElasticTrainer:
    for name, value in TRAIN_ENV.items():
        monkeypatch.setenv(name, value)
    config = Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"name": "tiny-random"},
            "data": {"train": [{"source": "embedded:orders/train"}]},
            "cluster": {"num_workers": 2},
        }
    )
    return make_trainer(config, resources={"CPU": 1.0}, settings=GroupSettings(WHERE, False, 30.0), scratch=tmp_path)


def _types(callbacks: list[Any]) -> set[type]:
    return {type(callback) for callback in callbacks}


def test_the_default_callbacks_are_asked_for_by_this_name(trainer: ElasticTrainer) -> None:
    assert "_create_default_callbacks" in vars(DataParallelTrainer), _needed("_create_default_callbacks", TRAINER)
    assert "self._create_default_callbacks()" in inspect.getsource(DataParallelTrainer.fit), _needed(
        "call of _create_default_callbacks in fit", TRAINER
    )
    assert isinstance(DataParallelTrainer._create_default_callbacks(trainer), list)


@pytest.mark.parametrize("callback", [DatasetsCallback, PlacementGroupCleanerCallback])
def test_a_callback_that_is_left_out_is_a_default_one(trainer: ElasticTrainer, callback: type) -> None:
    assert callback in _types(DataParallelTrainer._create_default_callbacks(trainer)), _needed(
        f"default callback {callback.__name__}", TRAINER
    )


@pytest.mark.parametrize(
    ("owns_cluster", "left_out"),
    [(True, {DatasetsCallback, PlacementGroupCleanerCallback}), (False, {DatasetsCallback})],
)
def test_only_what_is_not_used_is_left_out(trainer: ElasticTrainer, owns_cluster: bool, left_out: set[type]) -> None:
    trainer.owns_cluster = owns_cluster
    default = _types(DataParallelTrainer._create_default_callbacks(trainer))
    assert default - _types(trainer._create_default_callbacks()) == left_out


def test_no_further_default_callback_has_appeared(trainer: ElasticTrainer) -> None:
    names = {found.__name__ for found in _types(DataParallelTrainer._create_default_callbacks(trainer))}
    known = {
        "AcceleratorSetupCallback",
        "BackendSetupCallback",
        "DatasetsCallback",
        "PlacementGroupCleanerCallback",
        "UserCallbackHandler",
    }
    assert names == known, f"Ray {ray.__version__} has other default callbacks; look through them in {TRAINER}"


def test_a_trainer_knows_whether_its_cluster_ends_with_it(trainer: ElasticTrainer) -> None:
    assert trainer.owns_cluster is True
    assert ElasticTrainer.owns_cluster is False


def _values(module: Any) -> set[str]:
    return {value for value in vars(module).values() if isinstance(value, str)}


@pytest.mark.parametrize("name", sorted(TRAIN_ENV | start_env(1)))
def test_a_variable_that_we_set_is_one_that_ray_train_reads(name: str) -> None:
    assert name in _values(constants) | _values(ray.train.constants), _needed(f"variable {name}", TRAINER)


def test_the_preemption_watcher_can_be_switched_off() -> None:
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR == "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", _needed(
        "variable RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", CLUSTER
    )


@pytest.mark.parametrize("name", ["enable_worker_prestart", "prestart_worker_first_driver"])
def test_a_setting_of_the_raylet_still_exists(name: str) -> None:
    """`RAY_<name>` sets the raylet's config entry `<name>`, which stands as text in the program."""
    program = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"
    with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        assert text.find(name.encode()) >= 0, _needed(f"raylet setting {name}", CLUSTER)


@pytest.mark.parametrize("name", ["get_world_rank", "get_world_size", "get_local_rank", "get_local_world_size"])
def test_a_worker_can_ask_for_its_place(name: str) -> None:
    assert hasattr(ray.train.TrainContext, name), _needed(f"TrainContext.{name}", TRAINER)


def test_rank_0_can_tell_the_others() -> None:
    assert list(inspect.signature(ray.train.collective.broadcast_from_rank_zero).parameters) == ["data"], _needed(
        "collective.broadcast_from_rank_zero(data)", TRAINER
    )


def test_waiting_for_rank_0_has_no_limit_of_its_own() -> None:
    # The others wait there while the data is prepared, for hours if need be.
    assert constants.DEFAULT_COLLECTIVE_TIMEOUT_S is None, (
        f"Ray {ray.__version__} limits collectives; set {constants.COLLECTIVE_TIMEOUT_S_ENV_VAR} in {TRAINER}"
    )


@pytest.mark.parametrize("name", ["get_node_id", "get_accelerator_ids"])
def test_a_worker_can_ask_for_its_node_and_devices(name: str) -> None:
    assert hasattr(ray.runtime_context.RuntimeContext, name), _needed(f"RuntimeContext.{name}", TRAINER)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (ray.train.ScalingConfig, ["num_workers", "use_gpu", "resources_per_worker", "placement_strategy"]),
        (ray.train.RunConfig, ["name", "storage_path"]),
    ],
)
def test_configs_take_the_arguments_we_give(cls: type, names: list[str]) -> None:
    for name in names:
        assert name in inspect.signature(cls).parameters, _needed(f"{cls.__name__}({name}=)", TRAINER)


POLICIES = "src/dist_ft/orchestrate/workers/scaling.py"


def test_the_trainer_gives_its_policies_to_the_controller_by_name() -> None:
    source = inspect.getsource(DataParallelTrainer)
    assert "def _initialize_and_run_controller(self, **controller_init_kwargs)" in source, _needed(
        "DataParallelTrainer._initialize_and_run_controller(**kwargs)", TRAINER
    )
    for name in ("scaling_policy=", "failure_policy="):
        assert name in source, _needed(f"argument {name}", TRAINER)


def test_our_policies_answer_every_question() -> None:
    for cls in (ElasticPolicy, AskCoordinator):
        assert not cls.__abstractmethods__, _needed(f"set of questions without {cls.__abstractmethods__}", POLICIES)
    assert {d.name for d in FailureDecision} >= {"RETRY", "RAISE"}, _needed("FailureDecision", POLICIES)
    assert list(inspect.signature(ResizeDecision).parameters) == ["num_workers", "resources_per_worker"], _needed(
        "ResizeDecision(num_workers, resources_per_worker)", POLICIES
    )
    assert hasattr(ScalingPolicy, "_maybe_send_resource_request"), _needed("_maybe_send_resource_request", POLICIES)
    assert hasattr(ray.train.ScalingConfig, "_resources_per_worker_not_none"), _needed("ScalingConfig", POLICIES)


def test_the_trainer_hands_out_our_policies(trainer: ElasticTrainer) -> None:
    assert trainer.cluster.max_workers == 2
    assert trainer.coordinator == WHERE


NODES = "src/dist_ft/orchestrate/workers/nodes.py"
JOBS = "src/dist_ft/launchers/"


def test_a_policy_can_see_where_the_group_is_and_when_it_was_formed() -> None:
    assert {field.name for field in fields(WorkerGroupState)} >= {"start_time", "workers"}, _needed(
        "WorkerGroupState(start_time, workers)", POLICIES
    )
    assert {field.name for field in fields(ActorMetadata)} >= {"node_id", "node_ip"}, _needed(
        "ActorMetadata(node_id, node_ip)", POLICIES
    )
    assert "metadata" in {field.name for field in fields(Worker)}, _needed("Worker.metadata", POLICIES)


def test_a_policy_can_keep_the_group_off_nodes() -> None:
    hook = inspect.signature(ControllerCallback.on_controller_start_worker_group)
    assert list(hook.parameters) == ["self", "scaling_config", "num_workers"], _needed(
        "ControllerCallback.on_controller_start_worker_group(scaling_config, num_workers)", POLICIES
    )
    assert issubclass(ScalingPolicy, ControllerCallback), _needed("hook in ScalingPolicy", POLICIES)
    assert ray._raylet.RAY_NODE_ID_KEY == "ray.io/node-id", _needed("label ray.io/node-id", POLICIES)


def test_a_failure_says_whether_the_group_had_started() -> None:
    assert "controller_failure" in inspect.signature(ControllerError).parameters, _needed(
        "ControllerError.controller_failure", POLICIES
    )
    for cls in (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError):
        assert issubclass(cls, Exception), _needed(cls.__name__, POLICIES)


def test_the_state_of_the_nodes_can_be_asked_for() -> None:
    assert callable(ray._private.state.available_resources_per_node), _needed("available_resources_per_node", NODES)
    assert callable(ray._private.state.state.get_draining_nodes), _needed("get_draining_nodes", NODES)
    waiting = "src/dist_ft/orchestrate/workers/await_nodes.py"
    assert callable(ray._raylet.InnerGcsClient.get_all_node_info), _needed("GcsClient.get_all_node_info", waiting)


def test_a_job_can_be_given_time_for_a_checkpoint_and_a_signal_that_leaves_ranks_alone() -> None:
    assert "SIGINT" in JobSupervisor.VALID_STOP_SIGNALS, _needed("SIGINT as signal of a stop", JOBS)
    source = inspect.getsource(JobSupervisor)
    for name in ("RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_STOP_SIGNAL"):
        assert f'"{name}"' in source, _needed(name, JOBS)


def test_requests_of_the_job_client_can_be_given_a_limit() -> None:
    parameters = inspect.signature(JobSubmissionClient._do_request).parameters.values()
    assert any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters), _needed("_do_request(**kwargs)", JOBS)


def test_the_series_of_ray_is_the_one_of_the_package() -> None:
    check_ray_version()
    (needed,) = [line for line in requires("dist-ft") or [] if line.startswith("ray[")]
    assert f">={SERIES}" in needed
    assert f"<{SERIES.split('.')[0]}.{int(SERIES.split('.')[1]) + 1}" in needed


@pytest.mark.parametrize("found", ["2.59.1", "2.61.0", "3.0.0", "2.6.0"])
def test_another_ray_is_refused_with_what_to_install(found: str) -> None:
    with pytest.raises(UsageError, match=f"Ray {found} is installed.*pip install 'ray\\[default,train\\]==2.60"):
        check_ray_version(found)
