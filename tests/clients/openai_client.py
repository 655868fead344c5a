"""The official `openai` package against the real server, as it is: python3 -m unittest openai_client.

XRAY_SERVER names a program other than target/release/xray-qwen3vl.
"""

import base64
import json
import os
import pathlib
import re
import subprocess
import time
import unittest
import urllib.request

import openai

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("XRAY_SERVER", str(ROOT / "target/release/xray-qwen3vl"))
FILM = base64.b64encode((ROOT / "data/sample/demo.png").read_bytes()).decode()
KEY = "a-key-for-tests"


def film(data=FILM):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def question(text="这张胸片有什么异常？", data=FILM):
    return [{"role": "user", "content": [film(data), {"type": "text", "text": text}]}]


class Client(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        command = [PROGRAM, "serve", "--device", "cpu", "--port", "0", "--api-key", KEY]
        cls.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in cls.server.stderr:
            found = re.search(r"the API at (http://\S+/v1)", line)
            if found:
                break
        else:
            raise RuntimeError("the server did not start")
        cls.url = found.group(1)
        cls.client = openai.OpenAI(base_url=cls.url, api_key=KEY, max_retries=0)
        cls.model = cls.client.models.list().data[0].id

    @classmethod
    def tearDownClass(cls):
        cls.server.terminate()
        cls.server.wait(20)
        cls.server.stderr.close()

    def ask(self, **settings):
        settings = {"model": self.model, "messages": question(), **settings}
        return self.client.chat.completions.create(**settings)

    def test_models(self):
        self.assertEqual(self.client.models.retrieve(self.model).id, self.model)

    def test_chat_with_a_film(self):
        answer = self.ask()
        self.assertTrue(answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)

    def test_a_stream_is_the_whole_answer(self):
        whole = self.ask().choices[0].message.content
        chunks = list(self.ask(stream=True, stream_options={"include_usage": True}))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        self.assertEqual("".join(pieces), whole)
        self.assertGreater(sum(map(bool, pieces)), 1)
        self.assertGreater(chunks[-1].usage.completion_tokens, 0)

    def test_several_answers_seeds_and_stop(self):
        settings = {"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 12}
        texts = [choice.message.content for choice in self.ask(**settings).choices]
        self.assertEqual(len(texts), 3)
        again = [choice.message.content for choice in self.ask(**settings).choices]
        self.assertEqual(texts, again)
        whole = self.ask().choices[0].message.content
        stop = whole[len(whole) // 2]
        self.assertEqual(self.ask(stop=stop).choices[0].message.content, whole[: whole.index(stop)])

    def test_logprobs(self):
        content = self.ask(logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
        self.assertEqual(len(content), 4)
        for token in content:
            self.assertEqual(len(token.top_logprobs), 3)
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(token.top_logprobs[0].token, token.token)

    def test_json_follows_its_schema(self):
        schema = {
            "type": "object",
            "properties": {"normal": {"type": "boolean"}, "side": {"enum": ["左", "右", "双"]}},
            "required": ["normal", "side"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "r", "strict": True, "schema": schema}}
        found = json.loads(self.ask(response_format=form).choices[0].message.content)
        self.assertEqual(set(found), {"normal", "side"})
        self.assertIn(found["side"], ["左", "右", "双"])

    def test_errors_are_the_packages_own(self):
        stranger = openai.OpenAI(base_url=self.url, api_key="another-key", max_retries=0)
        with self.assertRaises(openai.AuthenticationError):
            stranger.models.list()
        with self.assertRaises(openai.NotFoundError):
            self.ask(model="no-such-model")
        with self.assertRaises(openai.BadRequestError) as caught:
            self.ask(messages=question(data=base64.b64encode(b"no picture").decode()))
        self.assertNotIn("0x", str(caught.exception))
        with self.assertRaises(openai.BadRequestError):
            self.ask(temperature=-1)

    def test_who_leaves_is_forgotten(self):
        with self.ask(stream=True, max_tokens=5000, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
        deadline = time.monotonic() + 5
        while self.running() > 0:
            self.assertLess(time.monotonic(), deadline, "the request still runs")
            time.sleep(0.02)
        self.assertTrue(self.ask().choices[0].message.content)

    def running(self):
        address = self.url.removesuffix("/v1") + "/metrics"
        request = urllib.request.Request(address, headers={"authorization": f"Bearer {KEY}"})
        text = urllib.request.urlopen(request).read().decode()
        return float(re.search(r"^xray_running (\S+)$", text, re.M).group(1))


if __name__ == "__main__":
    unittest.main()
