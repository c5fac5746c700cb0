"""papermill's command line, without a message of nbclient after which a cell with widgets can wait forever.

nbclient tells the kernel what an Output widget shows, on the same socket on which it waits for the cell's next message, and
sometimes misses that one (its issue 312). The notebook keeps the outputs without it.
"""

from nbclient.output_widget import OutputWidget
from papermill.cli import papermill

if __name__ == "__main__":
    OutputWidget.sync_state = lambda self: None
    papermill()
