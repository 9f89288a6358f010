"""The command line: a file for each kind of command, each thin."""

import os

# GNU OpenMP, in torch on Linux, has a thread that waits for others spin 300,000 times. Beside
# another busy process on two cores a training took over 50 times as long as alone; with 5,000 it
# takes 4 times, and alone as long as before. Set before torch comes; a wish of the user's counts.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
