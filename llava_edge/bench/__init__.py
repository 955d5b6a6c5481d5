"""`llava-edge bench`: time, memory and share of the machine's limit for each stage of an answer.

records.py   what was measured, as JSON       work.py      operations and bytes a stage cannot do without
child.py     one process, one measurement     runner.py    all processes, interleaved
picture.py   the picture that is shown        compare.py   two results, as ratios
table.py     text and CSV                     page.py      one HTML page
"""
