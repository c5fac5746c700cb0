"""papermill's command line without an answer that can make a cell of widgets wait for ever.

What a widget prints is shown in an Output widget, and nbclient tells the kernel so on the socket whose next message it awaits.
Now and then that message's arrival is lost with it (nbclient's issue 312). The outputs are kept in the notebook either way.
"""

from nbclient.output_widget import OutputWidget
from papermill.cli import papermill

if __name__ == "__main__":
    OutputWidget.sync_state = lambda self: None
    papermill()
