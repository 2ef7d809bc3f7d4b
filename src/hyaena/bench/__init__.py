"""How fast a model runs on this machine, beside what the machine allows.

    clock        samples of a quantity, and the timers that take them
    rates        how fast this machine moves bytes and multiplies
    machine      what was measured on, and with which versions
    measure      a prefill and a decoding step, timed, with the rates measured in turns with them
    memory       checks that a plan fits into memory before allocating
    run          all of a plan
    tables       aligned text and Markdown
    report       the result as a table and as JSON
    plot         the result as a picture

The bytes and operations that a result needs come from ``hyaena.sizes``. The folder ``benchmarks`` of the repository
measures with these same clocks, rates and tables.
"""
