// A server and a table of calls, for the scripts beside this file; see calls.py.

import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';

const root = process.env.XRAY_ROOT;
export const KEY = 'a-key-for-tests';
export const MODEL = 'tiny';
export const QUESTION = '这张胸片有什么异常？';
export const FILM = 'data:image/png;base64,' + readFileSync(`${root}/data/sample/demo.png`).toString('base64');

export async function startServer() {
  const program = process.env.XRAY_SERVER ?? `${root}/target/release/xray-qwen3vl`;
  const child = spawn(program, ['serve', '--device', 'cpu', '--port', '0', '--api-key', KEY]);
  const url = await new Promise((resolve, reject) => {
    let text = '';
    child.stderr.on('data', (data) => {
      text += data;
      const found = text.match(/the API at (http:\S+\/v1)/);
      if (found) resolve(found[1]);
    });
    child.on('exit', () => reject(new Error(`the server did not start: ${text}`)));
  });
  return { url, stop: () => child.kill() };
}

export class Calls {
  rows = [];
  failed = 0;

  constructor(client) {
    this.client = client;
  }

  // `call` has to resolve.
  async passes(name, call) {
    try {
      await call();
      this.rows.push([name, 'passed', '']);
    } catch (error) {
      this.failed += 1;
      this.rows.push([name, 'FAILED', `${error.name}: ${error.message}`]);
    }
  }

  // `call` has to reject with an error whose text contains `says`.
  async refused(name, call, says) {
    try {
      await call();
      this.failed += 1;
      this.rows.push([name, 'FAILED', 'was not refused']);
    } catch (error) {
      const text = `${error.name}: ${error.message} ${error.responseBody ?? ''}`;
      if (!text.includes(says)) this.failed += 1;
      this.rows.push([name, text.includes(says) ? 'refused' : 'FAILED', error.message]);
    }
  }

  end() {
    console.log(`| ${this.client} | result | |\n|---|---|---|`);
    for (const [name, result, why] of this.rows) {
      console.log(`| ${name} | ${result} | ${String(why).replace(/\s+/g, ' ').slice(0, 200).replaceAll('|', '\\|')} |`);
    }
    process.exitCode = this.failed ? 1 : 0;
  }
}

export function check(condition, what) {
  if (!condition) throw new Error(`unexpected: ${JSON.stringify(what)}`);
}

export function version(name) {
  return JSON.parse(readFileSync(`node_modules/${name}/package.json`)).version;
}
