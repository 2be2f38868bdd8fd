"""The supply chain: packages that Loopwise is installed with, their hashes, licences and advisories.

cpu.txt         hashes of what constraints.txt pins, for `make setup`
gpu.txt         the set for NVIDIA GPUs, pinned, with hashes, for `make setup GPU=1`
serve.txt       the part of cpu.txt that serving needs, for `make serve-only`
tools.txt       what `make audit` and renew.py need, for an environment of its own
licenses.txt    licences of what cpu.txt installs
waivers.txt     advisories that do not concern Loopwise, each with the day on which that is looked at anew
locks.py        reads and writes locks
renew.py        writes cpu.txt, gpu.txt and tools.txt from the package index
serving.py      writes serve.txt
licenses.py     writes licenses.txt
sbom.py         bills of materials (CycloneDX) of the locks
advisories.py   asks a database of advisories about the locks
"""
