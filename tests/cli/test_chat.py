"""`roadie chat`: lines from a pipe, adapters switched between them, and what Ctrl-C and the end of the input do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess

import pytest
from tests.signals import COMMAND_LINE
from transformers import AutoTokenizer
from typer.testing import CliRunner

from roadie.cli.app import app
from roadie.errors import ConfigError
from roadie.training.adapters import parse_adapters
from roadie.training.chat import Chat
from roadie.training.generation import Decoding

SHORT = Decoding(max_new_tokens=6)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def talked(*arguments, lines):
    """What is answered to lines on standard input."""
    given = [str(argument) for argument in ("chat", "-n", 6, *arguments)]
    result = CliRunner().invoke(app, given, input="".join(f"{line}\n" for line in lines), prog_name="roadie")
    assert result.exit_code == 0, result.output
    return result


def continued(roadie_cli, prompt, *arguments):
    """What `roadie generate` goes on with."""
    return json.loads(roadie_cli("generate", prompt, "-n", 6, "--json", *arguments).stdout)["text"]


def adapters(trained):
    return [part for name, path in trained.items() for part in ("-a", f"{name}={path}")]


def test_each_adapter_answers_as_in_generate(roadie_cli, trained):
    lines = ["07 is ", "/reset", "/adapter two", "07 is ", "/reset", "/adapter __base__", "07 is "]
    said = talked(*adapters(trained), lines=lines).stdout
    alone = [continued(roadie_cli, "07 is ", *adapters(trained), "-u", name) for name in ("one", "two", "__base__")]
    assert len(set(alone)) == 3
    assert said == "".join(f"{text}\n" for text in alone)


def test_a_strength_is_that_of_the_row(trained):
    chat = Chat.open(parse_adapters([f"{name}={path}" for name, path in trained.items()]), decoding=SHORT)
    base = Chat.open([], model=str(chat.model.peft_config["one"].base_model_name_or_path), decoding=SHORT)
    whole = chat.answer("07 is ", print)
    for strength, equals in (("0", base.answer("07 is ", print)), ("1", whole)):
        chat.take("/reset", print)
        assert chat.take(f"/strength {strength}", print)
        assert chat.answer("07 is ", print) == equals
    chat.take("/strength -0.5", print)
    assert chat.speaker == "one=-0.5"
    chat.take("/adapter __base__", print)
    assert chat.speaker == "__base__"


def test_without_a_template_the_text_goes_on_and_reset_forgets_it(roadie_cli, tiny_path):
    first = continued(roadie_cli, "07 is ", "-m", tiny_path)
    second = continued(roadie_cli, f"07 is {first}\n08 is ", "-m", tiny_path)
    third = continued(roadie_cli, "08 is ", "-m", tiny_path)
    assert second != third
    said = talked("-m", tiny_path, lines=["07 is ", "08 is ", "/reset", "08 is "]).stdout
    assert said == f"{first}\n{second}\n{third}\n"


def test_turns_go_through_the_chat_template(roadie_cli, tiny_path, tmp_path):
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    said = []
    chat = Chat.open([], model=str(folder), decoding=SHORT, system="be brief")
    seen = []
    chat.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    answer = chat.answer("07", said.append)
    assert "".join(said) == answer
    assert tokenizer.decode(seen[0][0]) == "<system>be brief\n<user>07\n<assistant>"
    seen.clear()
    chat.answer("08", said.append)
    expected = f"<system>be brief\n<user>07\n<assistant>{answer}\n<user>08\n<assistant>"
    assert tokenizer.decode(seen[0][0]) == expected
    assert chat.turns[:3] == [("user", "07"), ("assistant", answer), ("user", "08")]
    assert talked("-m", folder, lines=["07"]).stdout == continued(roadie_cli, "07", "-m", folder, "--chat") + "\n"


def test_turns_that_the_template_refuses_are_said_and_the_conversation_goes_on(roadie_cli, tiny_path, tmp_path):
    """Some templates take no system message."""
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    refused = "messages[0]['role'] == 'system' or '8' in messages[0]['content']"
    tokenizer.chat_template = f"{{% if {refused} %}}{{{{ raise_exception('not this') }}}}{{% endif %}}{TEMPLATE}"
    tokenizer.save_pretrained(folder)
    said = talked("-m", folder, "--system", "be brief", lines=["07", "/adapter"])
    assert "roadie: this conversation: got turns system, user; the chat template" in said.stderr
    assert said.stdout == "* __base__\n"
    result = roadie_cli("generate", "08", "-m", folder, "--chat")
    assert result.exit_code == 2
    assert "roadie: prompt '08': got turns user; the chat template" in result.stderr


def test_a_refusal_in_a_conversation_names_options(tiny_path):
    said = talked("-m", tiny_path, lines=["7 " * 200]).stderr
    assert "take fewer of the answer (--max-new-tokens 16)" in said
    assert "max_new_tokens" not in said


def test_the_oldest_turns_make_room_and_what_is_too_long_is_refused(tiny_path):
    chat = Chat.open([], model=str(tiny_path), decoding=SHORT)
    room = chat.model.config.max_position_embeddings
    for number in range(12):  # of more than 20 tokens each
        chat.answer(f"{number} is a number", lambda text: None)
        assert chat.turns[-2] == ("user", f"{number} is a number")
    assert room == 128
    assert len(chat.turns) < 2 * 6
    chat.turns = []
    with pytest.raises(ConfigError, match="fewer words"):
        chat.answer("7 " * room, lambda text: None)
    assert chat.turns == []


def test_commands_that_are_none_are_said_and_the_conversation_goes_on(trained):
    lines = ["/adapter three", "/strength much", "/nothing", "", "/adapter", "//", "/quit", "never read"]
    result = talked("-a", trained["one"], lines=lines)
    messages = [line for line in result.stderr.splitlines() if line.startswith("roadie: ")]
    assert messages[0] == "roadie: got adapter 'three'; wanted one of one, __base__"
    assert messages[1].startswith("roadie: got strength 'much'")
    assert messages[2].startswith("roadie: got '/nothing'; wanted /adapter, /strength")
    assert len(messages) == 3
    assert result.stdout.startswith("* one\n  __base__\n")
    assert result.stdout.endswith("\n")


@pytest.mark.parametrize("arguments", [("-a", "no/such/adapter"), ("-m", "./nowhere"), ("--system", "x")])
def test_what_cannot_be_opened_is_refused(roadie_cli, arguments):
    result = roadie_cli("chat", *arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("roadie: ")
    assert result.stdout == ""


def test_ctrl_c_stops_an_answer_and_the_end_of_the_input_ends(tmp_path):
    """A long and slow answer, stopped when its first piece is there; then the conversation goes on."""
    command = [*COMMAND_LINE, "chat", "-n", "300"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    slow = "import time, transformers\nshow = transformers.TextStreamer.put\n"
    slow += "def put(self, value):\n    show(self, value)\n    time.sleep(0.2)\ntransformers.TextStreamer.put = put\n"
    with subprocess.Popen(command, **pipes, text=True, bufsize=1, env=_with(slow, tmp_path)) as process:
        process.stdin.write("import sys\n")
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        stopped = first + process.stdout.readline()
        process.stdin.write("/reset\n/adapter\n")
        listed = process.stdout.readline()
        process.stdin.close()
        assert process.wait() == 0
    assert stopped.endswith(" [stopped]\n")
    assert listed == "* __base__\n"


def _with(script, folder):
    """An environment whose Python begins with a script."""
    scripts = folder / "scripts"
    scripts.mkdir(exist_ok=True)
    (scripts / "sitecustomize.py").write_text(script)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(scripts), os.environ.get("PYTHONPATH", "")))}


def test_generate_tells_prompts_from_answers(roadie_cli, tiny_path):
    text = continued(roadie_cli, "07 is ", "-m", tiny_path)
    shown = roadie_cli("generate", "07 is ", "-n", 6, "-m", tiny_path).stdout
    prompt, *answer = shown.removesuffix("\n").split("\n")
    assert prompt == "07 is "
    assert all(line.startswith("  │ ") for line in answer)
    assert "\n".join(line.removeprefix("  │ ") for line in answer) == text
