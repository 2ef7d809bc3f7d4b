"""Named texts in files: FASTA, FASTQ, JSON lines, Parquet and plain lines, read one record at a time."""

from hyaena.records.contents import Contents, Part, Shard, read_contents, read_part
from hyaena.records.readers import FORMATS, Record, Source, find_source, read_records

__all__ = [
    "FORMATS",
    "Contents",
    "Part",
    "Record",
    "Shard",
    "Source",
    "find_source",
    "read_contents",
    "read_part",
    "read_records",
]
