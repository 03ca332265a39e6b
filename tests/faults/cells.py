"""The matrix: what breaks, where and when, and what must hold. `lab.try_cell` tries a line of it."""

from __future__ import annotations

from faults import (
    At,
    Cell,
    Clock,
    DiskFull,
    EveryChange,
    Memory,
    NoNetwork,
    OpenFiles,
    Outcome,
    Proof,
    ReadOnly,
    SyncOrder,
    Twice,
)

STEP = "cigpose.train.step:train_step"
WEIGHTS = "cigpose.train.checkpoints:CheckpointStore.save_weights"
PUBLISH = "cigpose.train.checkpoints:_publish_locally"
SCORE = "cigpose.evaluate.coco:evaluate_predictions"
REPLACE = "cigpose.files.atomic:replace_folder"
TAR = "cigpose.shard.tars:write_shard"
COPY_OUT = "pipelines.training.results:copy_out"
CREATE = "pipelines.registry.versions:Registry._create"
CARRY_OUT = "pipelines.registry.versions:Registry._carry_out"


def death(job: str, what: str, fault: At | EveryChange, holds: Outcome = "dies", **more: object) -> Cell:
    return Cell(group="Death", job=job, what=what, fault=fault, holds=holds, **{"promise": 1, **more})  # type: ignore[arg-type]


def room(job: str, what: str, fault: object, holds: Outcome = "sentence", **more: object) -> Cell:
    return Cell(group="Room and rights", job=job, what=what, fault=fault, holds=holds, **{"promise": 2, **more})  # type: ignore[arg-type]


def two(job: str, what: str, fault: Twice | Proof, holds: Outcome = "sentence", **more: object) -> Cell:
    return Cell(group="Two at once", job=job, what=what, fault=fault, holds=holds, **{"promise": 5, **more})  # type: ignore[arg-type]


TOGETHER: list[tuple[str, str, dict[str, object]]] = [
    (
        "two `dvc repro`",
        "tests/pipelines/test_together.py::test_of_two_dvc_repro_the_second_says_who_is_there_and_nothing_is_done_twice",
        {},
    ),
    (
        "`make ui` twice",
        "tests/pipelines/test_ui.py::test_make_ui_brings_both_up_for_their_own_pages_only_draws_them_and_leaves_nothing_behind",
        {},
    ),
    (
        "two downloads into a folder",
        "tests/download/test_fetch.py::test_a_second_download_into_the_same_folder_is_refused",
        {},
    ),
    (
        "`dvc repro` beside a retraining",
        "tests/pipelines/test_retrain.py::test_while_a_training_runs_make_retrain_with_an_override_touches_neither_its_params_nor_its_lock",
        {},
    ),
    (
        "two trainings with one checkpoint address",
        "tests/pipelines/test_train_runs.py::test_two_runs_do_not_keep_their_checkpoints_at_one_address_at_once",
        {},
    ),
    (
        "two registrations, one at a server and one at its database",
        "tests/pipelines/test_registry.py::test_of_two_that_settle_at_a_server_or_one_at_its_database_the_better_is_champion",
        {},
    ),
    (
        "several that set MLflow's database up",
        "tests/pipelines/test_tracking.py::test_processes_that_make_the_database_at_once_do_not_break_it",
        {},
    ),
    (
        "several that deliver a run",
        "tests/pipelines/test_tracking.py::test_several_that_deliver_a_run_at_once_make_one",
        {},
    ),
]
HOSTILE = "tests/faults/test_hostile.py::test_"
BROKEN = [
    ("annotations with hostile values", f"{HOSTILE}hostile_annotations_are_sharded_or_refused_in_one_sentence", 2),
    ("annotations with harmed bytes", f"{HOSTILE}annotations_whose_bytes_are_harmed_are_sharded_or_refused", 2),
    ("archives with harmed bytes", f"{HOSTILE}a_harmed_archive_is_sharded_or_refused", 2),
    ("pictures with harmed bytes, and names that lead outside", f"{HOSTILE}a_harmed_picture_is_sharded_or_refused", 4),
    ("an index of shards with hostile values or bytes", f"{HOSTILE}a_hostile_index_of_shards_is_read_or_refused", 4),
    ("weights with harmed bytes or tables", f"{HOSTILE}harmed_weights_are_loaded_or_refused_with_their_name", 2),
    ("checkpoints with harmed bytes", f"{HOSTILE}of_harmed_checkpoints_none_is_taken_that_is_not_whole", 2),
    ("every leaf of params.yaml: wrong type, negative, zero, NaN, huge", "tests/test_config_limits.py", 2),
    ("pickles that run code", "tests/model/test_weights.py::test_a_pickle_that_would_run_code_is_refused_by_name", 4),
    (
        "a shard server whose index names files outside",
        "tests/loader/test_batches.py::test_a_hostile_index_touches_no_file_outside_the_cache",
        4,
    ),
    ("archives with links and members outside", "tests/download/test_integrity.py", 4),
    ("servers that drop, stall, send errors or other bytes", "tests/download/test_transfer.py", 2),
]

CELLS: list[Cell] = [
    # The files a stage makes: killed before each change of the disk.
    death("render", "killed before each change of the disk", EveryChange(), promise=2),
    death("shard", "killed before each change of the disk", EveryChange(step=6), promise=2),
    death("training", "killed before each change of the disk", EveryChange(step=15), promise=1),
    death("shard", "a worker killed while it writes a shard", At(at=TAR, nth=2), "sentence", says="was killed"),
    death("shard", "SIGTERM while a shard is written", At(at=TAR, do="TERM", whom="main"), promise=2),
    death("shard", "the power goes while a shard is written", At(at=TAR, nth=2, whom="all"), promise=2, sample=True),
    death("shard", "the power goes before the folder takes its name", At(at=REPLACE, whom="all"), promise=2),
    death("shard with labels", "killed once the folder has its name", At(at=REPLACE, when="after"), promise=2),
    death("shard", "stopped for 5 s while it writes a shard", At(at=TAR, do="STOP", seconds=5), "recovers", promise=2),
    # The library's training, without Ray.
    death("training", "killed mid-step", At(at=STEP, nth=5)),
    death("training", "killed while a checkpoint is written", At(at=PUBLISH, nth=4), sample=True),
    death("training", "killed between weights and state", At(at=WEIGHTS, when="after")),
    death("training", "killed during validation", At(at=SCORE, nth=2, whom="main")),
    death("training", "the process that scores a validation killed", At(at=SCORE, nth=2), "sentence", says="scores"),
    death("training", "stopped for 5 s mid-step", At(at=STEP, nth=4, do="STOP", seconds=5), "recovers"),
    # The stage: driver, worker and Ray.
    death("train", "a worker killed mid-step", At(at=STEP, nth=5), "recovers"),
    death("train", "the driver killed mid-step", At(at=STEP, nth=5, whom="main")),
    death("train", "SIGTERM to the driver mid-step", At(at=STEP, nth=5, do="TERM", whom="main")),
    death("train", "Ray's raylet killed mid-step", At(at=STEP, nth=5, whom="raylet"), "either", says="."),
    death("train", "Ray's server killed mid-step", At(at=STEP, nth=5, whom="gcs_server"), "either", says="."),
    death("train", "the power goes while a checkpoint is written", At(at=PUBLISH, nth=4, whom="all")),
    death("train", "a worker killed between weights and state", At(at=WEIGHTS, when="after"), "recovers"),
    death("train", "the driver killed during validation", At(at=SCORE, nth=2, whom="main")),
    death("train", "killed while results are copied out", At(at=COPY_OUT, nth=3)),
    death("train", "killed before the results are vouched for", At(at="pipelines.training.results:seal")),
    death("train", "killed while MLflow is synced", At(at="pipelines.tracking.sync:_Delivery._send_metrics", nth=2)),
    death("train", "a worker stopped for a minute", At(at=STEP, nth=5, do="STOP", seconds=60), "recovers"),
    death(
        "train", "the driver stopped for a minute", At(at=STEP, nth=5, do="STOP", whom="main", seconds=60), "recovers"
    ),
    death("evaluate", "killed while it scores", At(at=SCORE), promise=2),
    # Registration and promotion.
    death(
        "register",
        "killed once the results are logged",
        At(at="pipelines.registry.results:log_results", when="after"),
        promise=3,
    ),
    death(
        "register",
        "killed while the model is logged",
        At(at="pipelines.registry.package:build", when="after"),
        promise=3,
    ),
    death("register", "killed before the version is made", At(at=CREATE), promise=3),
    death("register", "killed once the version is made", At(at=CREATE, when="after"), promise=3),
    death("register", "killed before the promotion", At(at=CARRY_OUT), promise=3),
    death("register", "killed once the promotion is made", At(at=CARRY_OUT, when="after"), promise=3),
    # Room and rights.
    room("render", "disk full", DiskFull(kib=40), says="(?i)no space|disk"),
    room("shard", "disk full", DiskFull(kib=200), says="(?i)no space|disk", sample=True),
    room("training", "disk full", DiskFull(kib=4_000), says="disk is full"),
    room("train", "disk full", DiskFull(kib=4_000), says="disk|No space"),
    room("register", "disk full", DiskFull(kib=500), says="(?i)no space|disk|full", promise=3),
    room("shard", "no inode left", DiskFull(inodes=3), says="(?i)no space"),
    room("train", "no inode left", DiskFull(inodes=12), says="(?i)no space|disk"),
    room("render", "a read-only data/raw", ReadOnly(folder="data/raw"), says="data/raw"),
    room("shard", "a read-only data/shards", ReadOnly(folder="data/shards"), says="data/shards"),
    room("train", "a read-only data", ReadOnly(folder="data"), says="data/"),
    room("train", "a read-only .runs", ReadOnly(folder=".runs"), says=r"\.runs"),
    room("register", "a read-only mlartifacts", ReadOnly(folder="mlartifacts"), says="mlartifacts", promise=3),
    room("render", "64 open files", OpenFiles(number=64), "either", says="(?i)open files"),
    room("shard", "64 open files", OpenFiles(number=64), "either", says="(?i)open files"),
    room("train", "64 open files", OpenFiles(number=64), "either", says="."),
    room("register", "64 open files", OpenFiles(number=64), "either", says="(?i)open files", promise=3),
    room("train", "a /dev/shm of 1 MB", Memory(kib=1024), "either", says="."),
    room(
        "training",
        "a clock 30 days ahead, killed, and right again",
        Clock(offset="+30d", kill=At(at=STEP, nth=5)),
        "dies",
    ),
    room(
        "shard",
        "a clock 30 days behind, killed, and right again",
        Clock(offset="-30d", kill=At(at=TAR, nth=2, whom="main")),
        "dies",
    ),
    room(
        "train",
        "a clock a day ahead, killed, and right again",
        Clock(offset="+1d", kill=At(at=STEP, nth=5, whom="main")),
        "dies",
    ),
    room("train", "no network but loopback", NoNetwork(), "recovers"),
    room("register", "no network but loopback", NoNetwork(), "recovers", promise=3),
    # The order of syncs and renames.
    *(
        Cell(
            group="Power",
            job=job,
            what="what takes a final name is on the disk by then",
            fault=SyncOrder(),
            holds="recovers",
            promise=2,
            sample=job == "shard with labels",
        )
        for job in ("render", "shard with labels", "training", "train", "register")
    ),
    # Two at once.
    two("render", "a second rendering", Twice(hold=At(at=REPLACE)), says="running already"),
    two("shard", "a second sharding", Twice(hold=At(at=REPLACE)), says="running already", sample=True),
    two("train", "a second training of the run", Twice(hold=At(at=COPY_OUT)), says="running already"),
    two("register", "a second registration", Twice(hold=At(at=CREATE, seconds=10)), "either", says="turn"),
    *(two("test", what, Proof(test=test), **more) for what, test, more in TOGETHER),
    *(
        Cell(group="Broken input", job="test", what=what, fault=Proof(test=test), holds="either", promise=promise)
        for what, test, promise in BROKEN
    ),
]
