"""What every integration shares."""

import signal

# A shell that starts a run in the background has it ignore Ctrl-C, and every process under it. Tests send that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
