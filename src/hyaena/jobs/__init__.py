"""Batch jobs: rows of results for the records of a file, in one output, through any number of interruptions."""

from hyaena.jobs.job import Job, open_job
from hyaena.jobs.results import OUTPUT_FORMATS, Column, Row, check_columns, check_contig, check_output, write_results

__all__ = [
    "OUTPUT_FORMATS",
    "Column",
    "Job",
    "Row",
    "check_columns",
    "check_contig",
    "check_output",
    "open_job",
    "write_results",
]
