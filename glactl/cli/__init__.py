"""The command line: a file for each kind of command, each thin."""

import os

# GNU OpenMP, in torch on Linux, has a thread that waits for others spin 300,000 times, which beside
# another busy process takes the time that the others need: two trainings on two cores took 50 times
# as long as one, with 5,000 they take 4 times, and one alone as long as before. Set before torch
# comes; a wish of the user's counts.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
