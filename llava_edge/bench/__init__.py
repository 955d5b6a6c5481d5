"""`llava-edge bench`: time, memory and share of the machine's limits for each stage of an answer.

records.py   results, as dataclasses and JSON work.py      minimum operations and bytes of each stage
child.py     one process, one measurement     runner.py    all processes, interleaved
messages.py  what these two tell each other   picture.py   the picture to ask about
compare.py   ratios of two reports            table.py     text and CSV
page.py      one HTML page
"""
