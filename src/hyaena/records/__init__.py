"""Named texts in files: FASTA, FASTQ, JSON lines, Parquet and plain lines, one record at a time; genomes, variants."""

from hyaena.records.genome import FastaGenome, Genome, MemoryGenome
from hyaena.records.readers import FORMATS, Record, Source, check_readable, find_source, read_records
from hyaena.records.variants import Checked, Variant, Windows, check_variants, read_variants

__all__ = [
    "FORMATS",
    "Checked",
    "FastaGenome",
    "Genome",
    "MemoryGenome",
    "Record",
    "Source",
    "Variant",
    "Windows",
    "check_readable",
    "check_variants",
    "find_source",
    "read_records",
    "read_variants",
]
