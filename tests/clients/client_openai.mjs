// The `openai` package of npm.

import OpenAI from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { Calls, FILM, KEY, MODEL, QUESTION, check, startServer, version } from './calls.mjs';

const calls = new Calls(`openai (npm) ${version('openai')}`);
const server = await startServer();
const client = new OpenAI({ baseURL: server.url, apiKey: KEY, maxRetries: 0 });
const messages = [
  {
    role: 'user',
    content: [
      { type: 'image_url', image_url: { url: FILM } },
      { type: 'text', text: QUESTION },
    ],
  },
];
const Finding = z.object({ side: z.enum(['left', 'right']), normal: z.boolean() });
const report = {
  type: 'function',
  function: {
    name: 'report',
    description: 'Writes down whether the film is normal.',
    parameters: { type: 'object', properties: { normal: { type: 'boolean' } }, required: ['normal'] },
  },
};
const ask = (more) => client.chat.completions.create({ model: MODEL, messages, max_tokens: 200, ...more });

await calls.passes('models.list', async () => {
  const found = [];
  for await (const model of client.models.list()) found.push(model.id);
  check(found.includes(MODEL), found);
});
await calls.passes('chat with a film, request id', async () => {
  const { data, request_id } = await ask({}).withResponse();
  check(data.choices[0].message.content && data.id.endsWith(request_id), data);
});
await calls.passes('chat, stream', async () => {
  let text = '';
  for await (const chunk of await ask({ stream: true })) text += chunk.choices[0]?.delta?.content ?? '';
  check(text === (await ask({})).choices[0].message.content, text);
});
await calls.passes('chat.completions.parse with zod', async () => {
  const response_format = zodResponseFormat(Finding, 'finding');
  const found = await client.chat.completions.parse({ model: MODEL, messages, response_format, max_tokens: 200 });
  check(typeof found.choices[0].message.parsed.normal === 'boolean', found);
});
await calls.passes('tools: named', async () => {
  const choice = { type: 'function', function: { name: 'report' } };
  const found = await ask({ tools: [report], tool_choice: choice });
  check('normal' in JSON.parse(found.choices[0].message.tool_calls[0].function.arguments), found);
});
await calls.passes('chat.completions.runTools', async () => {
  let ran = 0;
  const tool = {
    type: 'function',
    function: { ...report.function, parse: JSON.parse, function: () => { ran += 1; return 'done'; } },
  };
  const runner = client.chat.completions.runTools(
    { model: MODEL, messages, tools: [tool], tool_choice: { type: 'function', function: { name: 'report' } }, max_tokens: 200 },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  check(ran >= 1, ran);
});
await calls.passes('chat.completions.stream with tools', async () => {
  const stream = client.chat.completions.stream({ model: MODEL, messages, tools: [report], tool_choice: 'required', parallel_tool_calls: false, max_tokens: 200 });
  const found = await stream.finalChatCompletion();
  check(found.choices[0].message.tool_calls[0].function.name === 'report', found);
});
await calls.passes('completions', async () => {
  const found = await client.completions.create({ model: MODEL, prompt: '心影', max_tokens: 4 });
  check(found.choices[0].text, found);
});
await calls.passes('responses with a film', async () => {
  const content = [{ type: 'input_image', image_url: FILM, detail: 'auto' }, { type: 'input_text', text: QUESTION }];
  const found = await client.responses.create({ model: MODEL, input: [{ role: 'user', content }], max_output_tokens: 60 });
  check(found.output_text, found);
});
await calls.passes('responses.stream', async () => {
  const stream = client.responses.stream({ model: MODEL, input: '？', max_output_tokens: 20 });
  let text = '';
  stream.on('response.output_text.delta', (event) => (text += event.delta));
  const found = await stream.finalResponse();
  check(found.output_text === text && text, found);
});
const stranger = new OpenAI({ baseURL: server.url, apiKey: 'another-key', maxRetries: 0 });
const large = [{ role: 'user', content: 'x'.repeat(4_000_000) }];
await calls.refused('a wrong key with a body of 4 MB', () => stranger.chat.completions.create({ model: MODEL, messages: large }), '401 expected the header');
await calls.refused('an unknown model', () => ask({ model: 'gpt-4o' }), 'does not exist');
await calls.refused('responses: store', () => client.responses.create({ model: MODEL, input: '？', store: true }), 'nothing is stored');
await calls.refused('embeddings', () => client.embeddings.create({ model: MODEL, input: 'a' }), 'nothing at this path');
calls.end();
server.stop();
