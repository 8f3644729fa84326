"""The contract with MONAI Label, uvicorn, dicomweb-client and MONAI's engines, as it stands in their code: what
lib/upstream.py relies on, fact by fact. After an upgrade, what fails here names what changed and what was built on it.
What they do is in test_upstream_behaviour.py.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
from typing import Any

import pytest
import uvicorn.server
from dicomweb_client import DICOMwebClient
from ignite.handlers import EarlyStopping
from monai.engines import Evaluator, SupervisedEvaluator, SupervisedTrainer, Workflow
from monai.handlers import ValidationHandler
from monailabel.config import Settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.batch_infer import BatchInferTask, run_infer_task
from monailabel.tasks.infer.basic_infer import BasicInferTask
from monailabel.tasks.train.basic_train import BasicTrainTask, Context
from monailabel.utils.async_tasks import task as async_task
from monailabel.utils.async_tasks import utils as async_utils
from monailabel.utils.others import class_utils, generic
from requests.adapters import HTTPAdapter

from lib import upstream
from support import ROOT

LIB = ROOT / "apps" / "bipvl" / "lib"
MODULES = sorted(path for path in LIB.rglob("*.py") if path.name != "upstream.py")
THEIRS = ("monailabel", "uvicorn", "dicomweb_client")
PRIVATE = {  # of other objects, each harmless or of a package whose version does not matter
    "_replace": "a named tuple's public method",
    "_version": "PyTorch's count of changes of a tensor, the only way to see an optimiser's step",
    "_modules": "highdicom's table, imported early so that the first save does not wait for it",
}


@pytest.mark.parametrize("package", upstream.VERSIONS)
def test_the_version_is_the_one_that_was_checked(package):
    checked, found = upstream.VERSIONS[package], importlib.metadata.version(package)
    assert found == checked, (
        f"{package} {found} is installed, the assumptions were checked with {checked}: "
        "if all other tests of the files test_upstream_*.py pass, write the new version into lib/upstream.py"
    )
    assert f"\n{package}=={checked} " in (ROOT / "requirements.txt").read_text()


# Nobody else assumes anything ---------------------------------------------------------------------------------------


def test_no_other_module_knows_them():
    wrong = {}
    for path in MODULES:
        tree = ast.parse(path.read_text())
        found = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found = {name for name in found if name.split(".")[0] in THEIRS}
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not _own(node.value)]
        found |= {a.attr for a in attributes if re.match(r"_[a-z]", a.attr)} - set(PRIVATE)
        if found:
            wrong[str(path.relative_to(LIB))] = found
    assert not wrong, "private to a package or another object: give it a public name, a package's in lib/upstream.py"


def _own(value: ast.expr) -> bool:
    inherited = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
    return inherited or (isinstance(value, ast.Name) and value.id in ("self", "cls"))


# What stands in their code ------------------------------------------------------------------------------------------

SIGNATURES: list[tuple[Any, str, str]] = [
    (MONAILabelApp.__init__, "self, app_dir, studies, conf, name, description, version, labels", "BiPVLApp's start"),
    (MONAILabelApp.init_datastore, "self", "which store the app has"),
    (MONAILabelApp.init_infers, "self", "our models"),
    (MONAILabelApp.init_trainers, "self", "our trainers"),
    (MONAILabelApp.init_strategies, "self", "our strategies"),
    (MONAILabelApp.init_scoring_methods, "self", "our scoring methods"),
    (MONAILabelApp.init_batch_infer, "self", "batch inference"),
    (MONAILabelApp.on_init_complete, "self", "where our routes are put in"),
    (MONAILabelApp._load_sessions, "self, load", "our sessions, which cannot be escaped from"),
    (MONAILabelApp.infer, "self, request, datastore", "batch inference calls it"),
    (MONAILabelApp.scoring, "self, request, datastore", "the process of a scoring task calls it"),
    (MONAILabelApp.next_sample, "self, request", "leases"),
    (MONAILabelApp.on_save_label, "self, image_id, label_id", "the end of a lease"),
    (MONAILabelApp.model_info, "self, model", "GET /model/info"),
    (BasicInferTask.__call__, "self, request, callbacks", "Segmentation"),
    (BasicInferTask.run_inferer, "self, data, convert_to_batch, device", "Segmentation"),
    (BasicInferTask.writer, "self, data, extension, dtype", "Segmentation"),
    (upstream.write_itk, "image_np, output_file, affine, dtype, compress", "MetaImage files"),
    (BasicTrainTask.__call__, "self, request, datastore", "RoundTask"),
    (BasicTrainTask.train, "self, rank, world_size, request, datalist", "a fold is a call of another task"),
    (BasicTrainTask.pre_process, "self, request, datastore", "the audit of labels"),
    (BasicTrainTask.partition_datalist, "self, context, shuffle", "a case that validated never trains"),
    (BasicTrainTask.finalize, "self, context", "publishing"),
    (BasicTrainTask.cleanup, "self, request", "a fold's cache"),
    (BasicTrainTask.train_data_loader, "self, context, num_workers, shuffle", "the trainer's engine"),
    (BasicTrainTask.val_data_loader, "self, context, num_workers", "the evaluator's engine"),
    (BasicTrainTask._create_evaluator, "self, context", "our engine"),
    (BasicTrainTask._create_trainer, "self, context", "our engine"),
    (BatchInferTask.__call__, "self, request, datastore, infer", "batch inference"),
    (BatchInferTask.get_images, "self, request, datastore", "batch inference"),
    (run_infer_task, "req, datastore, infer", "batch inference"),
    (async_utils.run_background_task, "request, method, callback, debug", "tasks"),
    (class_utils.get_class_of_subclass_from_file, "module_name, file_path, class_c", "how the app is found"),
    (DICOMwebClient.search_for_series, None, "the list of images: search_filters, offset"),
    (DICOMwebClient.retrieve_instance_metadata, None, "headers of a SEG"),
    (DICOMwebClient.iter_series, None, "downloads: media_types"),
    (DICOMwebClient.store_instances, None, "saved labels"),
    (HTTPAdapter.send, "self, request, stream, timeout, verify, cert, proxies", "time limits"),
    (Evaluator.run, "self, global_epoch", "the epoch that a validation belongs to"),
]
NEEDED = {
    DICOMwebClient.search_for_series: ("search_filters", "offset"),
    DICOMwebClient.retrieve_instance_metadata: (
        "study_instance_uid",
        "series_instance_uid",
        "sop_instance_uid",
    ),
    DICOMwebClient.iter_series: ("study_instance_uid", "series_instance_uid", "media_types"),
    DICOMwebClient.store_instances: ("datasets",),
}


@pytest.mark.parametrize(("function", "expected", "built"), SIGNATURES, ids=lambda v: getattr(v, "__qualname__", ""))
def test_what_is_called_or_overridden_takes_the_same(function, expected, built):
    found = list(inspect.signature(function).parameters)
    if expected is None:
        assert set(NEEDED[function]) <= set(found), f"{function.__qualname__} takes {found}; built on it: {built}"
    else:
        assert ", ".join(found) == expected, f"{function.__qualname__} changed; built on it: {built}"


FACTS: list[tuple[Any, str, str]] = [
    (MONAILabelApp.__init__, "self._infers = self.init_infers()", "upstream.models"),
    (MONAILabelApp.__init__, "self._trainers = self.init_trainers()", "upstream.trainers"),
    (MONAILabelApp.__init__, "self._strategies = self.init_strategies()", "upstream.strategies"),
    (MONAILabelApp.__init__, "self._scoring_methods = self.init_scoring_methods()", "upstream.scoring_methods"),
    (MONAILabelApp.__init__, "self._auto_update_scoring = settings.", "upstream.take_over_scoring"),
    (MONAILabelApp.__init__, "self._sessions = self._load_sessions(load=settings.MONAI_LABEL_SESSIONS)", "sessions"),
    (MONAILabelApp.train, "if self._auto_update_scoring:", "upstream.take_over_scoring"),
    (MONAILabelApp.on_init_complete, "instance.cleanup_sessions()", "expired sessions go"),
    (MONAILabelApp.cleanup_sessions, "self._sessions.remove_expired()", "Sessions.remove_expired"),
    (MONAILabelApp.model_info, "self.model_file(model)", "GET /model/info"),
    (MONAILabelApp.model_file, "task.get_path(validate)", "GET /model/info"),
    (MONAILabelApp._download_dcmqi_tools, "shutil.which(tool)", "no download if dcmqi is installed"),
    (class_utils.is_subclass, "o.__bases__", "the app class is a direct subclass"),
    (class_utils.unload_module, "del sys.modules[m]", "modules are imported eagerly: lib is wiped when an app loads"),
    (async_task.AsyncTask.run, "return run_background_task(request, method), None", "upstream.start_task"),
    (async_task.AsyncTask.run, 'instance.info().get("config", {})', "our info() names no options of tasks"),
    (async_utils._task_func, '"monailabel.interfaces.utils.app"', "tasks run in processes of their own"),
    (async_utils._task_func, 'task["details"] = deque(', "the last lines of a task"),
    (async_utils._task_func, 'my_env["CUDA_VISIBLE_DEVICES"] = gpus', "the option gpus"),
    (async_utils.run_background_task, '"start_ts": datetime.today().strftime("%Y-%m-%d %H:%M:%S")', "upstream.started"),
    (async_utils.stop_background_task, "psutil.Process(pid=process.pid)", "upstream.stop_task"),
    (generic.init_log_config, 'os.path.join(app_dir, "logs")', "upstream.log_file"),
    (BasicInferTask.__call__, 'strtobool(data.get("skip_writer"))', "the web refuses skip_writer"),
    (BasicTrainTask.train, 'context.max_epochs = request["max_epochs"]', "a fold's epochs"),
    (BasicTrainTask.train, 'f"cache_{context.run_id}"', "rounds.only_round clears killed rounds' caches"),
    (BasicTrainTask.stats, "json.load", "upstream.TrainTask.stats_file"),
    (BatchInferTask.__call__, 'req["save_label"] = True', "batch inference keeps its masks"),
    (BatchInferTask.get_images, "return images", "ids in a request are taken as they are"),
    (BatchInferTask.__call__, 'req["image"] = image_id', "the image that a failure names"),
    (run_infer_task, 'remove_file(r.get("file"))', "batch inference removes its temporary masks"),
    (uvicorn.server.Server.capture_signals, "signal.signal(sig, self.handle_exit)", "upstream.at_shutdown"),
    (uvicorn.server.Server._serve, "self.lifespan = config.lifespan_class(config)", "upstream.at_shutdown"),
    (uvicorn.server.Server.shutdown, "await self.lifespan.shutdown()", "upstream.at_shutdown"),
    (ValidationHandler.__call__, "self.validator.run(engine.state.epoch)", "the best epoch is the trainer's"),
    (Workflow.__init__, "best_metric_epoch=-1", "the best epoch so far is kept"),
    (EarlyStopping.load_state_dict, 'state_dict["best_score"]', "a resumed round's patience"),
]


@pytest.mark.parametrize(("place", "text", "built"), FACTS, ids=lambda v: getattr(v, "__qualname__", None))
def test_their_code_still_says(place, text, built):
    assert text in inspect.getsource(place), f"{place.__qualname__} no longer has {text!r}; built on it: {built}"


def test_statuses_of_tasks_are_known():
    found = set(re.findall(r'"status"\]?(?: =|:) "([A-Z]+)"', inspect.getsource(async_utils)))
    assert found == {"SUBMITTED", "RUNNING", "DONE", "STOPPED"}, "upstream.RUNNING, and how a round's end is told"
    assert '"DONE" if process.returncode == 0 else "ERROR"' in inspect.getsource(async_utils._task_func)


def test_settings_that_we_read_exist():
    named = {
        name
        for p in (*MODULES, LIB / "upstream.py")
        for name in re.findall(r"MONAI_LABEL_[A-Z_]+[A-Z](?![A-Z_])", p.read_text())
    }
    assert not named - set(Settings.model_fields), "MONAI Label renamed or dropped these"
    assert len(named) > 20


def test_defaults_of_a_train_task_are_these():
    """Options that MONAI Label adds would be shown to annotators."""
    options = BasicTrainTask.__init__
    defaults = set(re.findall(r'^            "(\w+)":', inspect.getsource(options), re.MULTILINE))
    assert defaults == {
        *("name", "pretrained", "device", "max_epochs", "early_stop_patience", "val_split", "train_batch_size"),
        *("val_batch_size", "multi_gpu", "gpus", "dataset", "dataloader", "tracking", "tracking_uri"),
        "tracking_experiment_name",
    }


def test_the_context_of_a_round_has_what_we_read():
    text = "\n".join(path.read_text() for path in (LIB / "trainers").glob("*.py"))
    read = set(re.findall(r"\bcontext\.([a-z_]+)\b", text)) - {"schedule"}  # ours
    assert len(read) > 10
    assert read <= set(vars(Context()))


@pytest.mark.parametrize("engine", [SupervisedTrainer, SupervisedEvaluator])
def test_engines_take_our_steps(engine):
    taken = set(inspect.signature(engine.__init__).parameters)
    assert {"iteration_update", "decollate", "network", "device", "additional_metrics"} <= taken


def test_the_viewer_comes_along():
    page = (upstream.OHIF / "index.html").read_text()
    assert "<script defer" in page, "our panel is put before it"
