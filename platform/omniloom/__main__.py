"""`python -m omniloom VERB …`: the console script where its folder is on no path, as in a cluster's job."""

from omniloom.cli import main

main()
