"""Checkpoints: resumable under any layout.

sharded.save --> step-N.partial/  .metadata  __<rank>_0.distcp  progress.json  complete.json
    --rename--> step-N/
sharded.load <-- marker.verify <-- metadata.read (allow-list)          manager: when to save, which to keep
"""
