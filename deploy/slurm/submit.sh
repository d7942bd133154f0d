#!/usr/bin/env bash
# Submits a whole project, from text to students. From the project's folder:
#
#   deploy/slurm/submit.sh                  corpus, teacher cache, students, then their evaluation
#   deploy/slurm/submit.sh teacher-cache    all but the corpus
#
# Time and GPUs are in the .sbatch files; partition, account and other options for all jobs come from
# SBATCH_PARTITION, SBATCH_ACCOUNT and so on.
#
# An array task ends with 0 only once the whole cache is there. Where one was killed or failed, what
# is not finished is submitted again, ATTEMPTS times. Finished parts and shards are kept.
set -euo pipefail
. deploy/slurm/settings.sh
mkdir -p logs

after=() corpus=
if [ "${1:-corpus}" = corpus ]; then
  corpus=$(sbatch --parsable deploy/slurm/corpus.sbatch)
  corpus=${corpus%%;*}
  after=(--dependency="afterok:$corpus" --kill-on-invalid-dep=yes)
fi
cache=$(sbatch --parsable "${after[@]}" --array="0-$((WORKERS - 1))" deploy/slurm/teacher-cache.sbatch)
cache=${cache%%;*}
students=$(sbatch --parsable --dependency="afterok:$cache" --kill-on-invalid-dep=yes \
  deploy/slurm/student-train.sbatch)
sbatch --dependency="afterok:${students%%;*}" --kill-on-invalid-dep=yes deploy/slurm/evaluate.sbatch
if [ "$ATTEMPTS" -gt 0 ]; then
  ATTEMPTS=$((ATTEMPTS - 1)) sbatch --dependency="afternotok:$cache" --kill-on-invalid-dep=yes \
    deploy/slurm/again.sbatch ${corpus:+"$cache"}
fi
