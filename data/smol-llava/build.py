"""Put smol-llava together in the cache: python data/smol-llava/build.py [smol-llava | smol-llava-long]

About a minute of one core, once. Prints the folder, which transformers opens without this project.
"""

import argparse
import os
import shutil
import sys

import store


def build(name: str) -> None:
    """Write the checkpoint where it is not there yet, whole or not at all."""
    folder = store.target(name)
    with store.writing(megabytes=1200):
        if store.whole(folder):  # by another process, while this one waited
            return
        say("putting it together, once")
        import parts  # half of the time is for what it imports, so it waits until it is needed

        model, processor = parts.build(store.HERE.parent / name)
        new = store.place() / "new"
        shutil.rmtree(new, ignore_errors=True)  # what a killed process left
        model.save_pretrained(new)
        processor.save_pretrained(new)
        store.note(new)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(new, folder)


def say(text: str) -> None:
    print(f"smol-llava: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="smol-llava", choices=["smol-llava", "smol-llava-long"])
    name = parser.parse_args().name
    try:
        build(name)
    except (store.Unavailable, FileNotFoundError) as error:
        sys.exit(str(error))
    print(store.target(name))
