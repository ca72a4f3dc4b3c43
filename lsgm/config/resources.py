"""The resources that jobs request from a cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from lsgm.config.bounds import Few, Number, Positive
from lsgm.config.section import Section


class JobConfig(Section):
    """The resources that a job requests. They change where and how fast it runs, never its result."""

    nodes: Few = Field(1, description="number of nodes")
    gpus: Annotated[int, Number, Field(ge=0, le=1024)] = Field(
        0, description="number of GPUs per node; training runs one process per GPU"
    )
    cpus: Few = Field(
        2, description="number of CPUs per process; there is one process per GPU, or one per node without GPUs"
    )
    mem_gb: Annotated[Positive, Field(le=1e6)] = Field(8, description="main memory per node in GB")
    hours: Annotated[Positive, Field(le=1e5)] = Field(
        24, description="time limit in hours; training that needs longer resumes in another job"
    )


class SharedJobConfig(JobConfig):
    """What each of the jobs asks for that share a stage."""

    jobs: Few = Field(
        1,
        description="number of jobs that share the images: samples, or the test images of the NELBO; the result is the "
        "same for any number",
    )


class ResourcesConfig(Section):
    """The resources of a model's jobs, by stage."""

    pretrain: JobConfig = JobConfig()
    train: JobConfig = JobConfig()
    sample: SharedJobConfig = SharedJobConfig(hours=4)
    evaluate: SharedJobConfig = SharedJobConfig(hours=12)

    @model_validator(mode="after")
    def _one_process_uses_one_gpu(self) -> ResourcesConfig:
        for stage, job in (("sample", self.sample), ("evaluate", self.evaluate)):
            if job.nodes > 1 or job.gpus > 1:
                raise ValueError(f"{stage}: runs as one process, which uses one node and at most one GPU")
        return self
