"""Files become shards, shards become one deterministic stream of rows.

The story, in call order: `manifest.read_manifest` names the files, `units.list_units` gathers and cuts them;
`corpus.build_corpus` has workers turn each unit's documents (`readers.read_documents`) into a shard
(`shards.write_shard`) and writes the index last; `shards.Corpus` opens the shards by memory map;
`mixture.document_order` says which document comes next; `pack.pack_rows` lays documents into rows;
`loader.rank_batches` hands each rank its part of every global batch.
"""
