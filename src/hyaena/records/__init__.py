"""Named texts in files: FASTA, FASTQ, JSON lines, Parquet and plain lines, read one record at a time."""

from hyaena.records.readers import FORMATS, Record, Source, check_readable, find_source, read_records

__all__ = ["FORMATS", "Record", "Source", "check_readable", "find_source", "read_records"]
