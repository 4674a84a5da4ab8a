"""Files to shards: `omniloom tokenize manifest=corpus.yaml corpus=corpora/mine`."""

from omniloom.cluster.session import ray_session
from omniloom.compose import run_job
from omniloom.settings import TokenizeSettings


def main(settings: TokenizeSettings) -> None:
    settings.check()
    with ray_session(settings.cluster):
        from omniloom.data.build import build_corpus, describe

        print(describe(build_corpus(settings)))


if __name__ == "__main__":
    run_job("tokenize_corpus", TokenizeSettings, main)
