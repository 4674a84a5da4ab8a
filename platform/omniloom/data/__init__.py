"""Files become shards, shards become one deterministic stream of rows.

The story, in call order. Once, as a job: `manifest.read_manifest` names the files, `units.list_units` gathers and cuts
them; `build.build_corpus` has workers turn each unit into a shard (`write.write_shard`: `readers.read_documents` →
`weave.Weaver`, whose media a child decodes, `decode.Decoders` → `shards.write_documents`); `tables.write_index` joins
what the shards say of themselves and writes the index, last.

Then, for every run: `corpus.Corpus` opens the index, `corpus.Documents` numbers the documents of one corpus or several;
`schedule.read_schedule` says what the configuration asks of them; `plan.open_plan` writes down once which pieces of
which documents lie in which row (`mixture.DocumentOrder` says what comes next, `pack.Packer` where it fits);
`loader.rank_batches` hands each rank its part of every global batch.
"""
