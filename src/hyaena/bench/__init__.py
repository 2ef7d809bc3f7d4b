"""How fast a model runs on this machine, beside what the machine allows.

    floors       what a prefill and a decoding step cannot do without, in operations and bytes; no torch
    rates        how fast this machine copies and multiplies
    measure      a prefill and a decoding step, timed
    room         whether a plan fits into memory
    run          all of a plan
    report       the result as a table and as JSON
    plot         the result as a picture

A floor divided by a measured rate is the shortest time that the work can take on this machine, so that every figure
comes as a part of what is possible, not as a number without a scale.
"""
