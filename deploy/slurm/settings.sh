# Read by every file here; the rest of the settings are in the recipe.

# A recipe whose root lies on a file system that all nodes share.
export RECIPE="${RECIPE:-recipes/distilbert.toml}"
# Array tasks of stage one, one device each; may be another number at every submission.
export WORKERS="${WORKERS:-8}"
# Times that what failed or was killed is submitted again by itself.
export ATTEMPTS="${ATTEMPTS:-5}"
# Makes `distilcache` available; replace by `module load ...` where that is how it is done.
if [ -f .venv/bin/activate ]; then
  . .venv/bin/activate
fi
