"""Abuse on purpose: kills, lost processes, erring disks, flipped bits, wrong inputs, fuzzing."""
