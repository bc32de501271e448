"""Writes the logs beside this file, each with the writer that a trainer uses.

    python tests/data/logs/write_logs.py

needs torch, transformers, accelerate, lightning, tensorboard, wandb and mlflow. A linear model of
forty weights learns by SGD, with one batch that is a hundred times as large as the others. All
logs but that of the Trainer are of one run, so that their norms are the same.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

HERE = pathlib.Path(__file__).parent
STEPS, SPIKE = 60, 40


def batches() -> Iterator[tuple]:
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(40, generator=generator)
    for step in range(STEPS):
        inputs = torch.randn(32, 40, generator=generator)
        noise = torch.randn(32, generator=generator)
        size = 100.0 if step == SPIKE else 1.0
        yield inputs, size * (inputs @ weights + noise)


def train() -> Iterator[tuple[int, float, float]]:
    """Step, norm and loss of each step."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(40, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step, (inputs, targets) in enumerate(batches()):
        optimizer.zero_grad()
        loss = torch.mean((model(inputs)[:, 0] - targets) ** 2)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        yield step, norm.item(), loss.item()


def write_trainer_state(path: pathlib.Path) -> None:
    """`trainer_state.json` of `transformers.Trainer`."""
    import torch
    import transformers

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(40, 1)

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict:
            outputs = self.linear(inputs)[:, 0]
            return {"loss": torch.mean((outputs - labels) ** 2), "logits": outputs}

    examples = [
        {"inputs": inputs[row], "labels": targets[row]}
        for inputs, targets in batches()
        for row in range(32)
    ]
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            logging_steps=2,
            max_grad_norm=10.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(Model(), arguments, train_dataset=examples)
        trainer.train()
        trainer.state.save_to_json(path)


def write_lightning_csv(path: pathlib.Path) -> None:
    """`metrics.csv` of Lightning's `CSVLogger`."""
    from lightning.pytorch.loggers import CSVLogger

    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder, flush_logs_every_n_steps=1000)
        for step, norm, loss in train():
            logger.log_metrics({"grad_2.0_norm/weight": norm, "grad_2.0_norm_total": norm}, step)
            logger.log_metrics({"train_loss": loss, "epoch": 0}, step)
        logger.save()
        shutil.copy(pathlib.Path(logger.log_dir) / "metrics.csv", path)


def write_tensorboard(path: pathlib.Path) -> None:
    """An event file of `torch.utils.tensorboard.SummaryWriter`."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for step, norm, loss in train():
            writer.add_scalar("train/grad_norm", norm, step)
            writer.add_scalar("train/loss", loss, step)
        writer.close()
        (written,) = pathlib.Path(folder).iterdir()
        shutil.copy(written, path)


def write_wandb(path: pathlib.Path) -> None:
    """The file of an offline run of Weights & Biases."""
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(
            mode="offline",
            silent=True,
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
        )
        with wandb.init(project="clipax", dir=folder, settings=settings) as run:
            for step, norm, loss in train():
                run.log({"train/grad_norm": norm, "train/loss": loss}, step=step)
        # The file is written by a process of its own.
        wandb.teardown()
        (written,) = pathlib.Path(folder).rglob("*.wandb")
        shutil.copy(written, path)


def write_mlflow(path: pathlib.Path) -> None:
    """The metric file of MLflow's file store."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri((pathlib.Path(folder) / "mlruns").as_uri())
        with mlflow.start_run():
            for step, norm, _ in train():
                mlflow.log_metric("grad_norm", norm, step)
        (written,) = pathlib.Path(folder).rglob("metrics/grad_norm")
        shutil.copy(written, path)


def write_json_lines(path: pathlib.Path) -> None:
    """What a loop of one's own prints with `json.dumps`."""
    rows = ({"step": step, "loss": loss, "grad_norm": norm} for step, norm, loss in train())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[pathlib.Path], None]] = {
    "trainer_state.json": write_trainer_state,
    "lightning/metrics.csv": write_lightning_csv,
    "tensorboard/events.out.tfevents.0": write_tensorboard,
    "wandb/run.wandb": write_wandb,
    "mlflow/metrics/grad_norm": write_mlflow,
    "log.jsonl": write_json_lines,
}


def main(names: list[str]) -> None:
    for name in names or WRITERS:
        path = HERE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name](path)


if __name__ == "__main__":
    main(sys.argv[1:])
