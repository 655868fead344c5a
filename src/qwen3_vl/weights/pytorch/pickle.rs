//! The pickle of a state dict, read by a machine that can build one and nothing else.
//!
//! Each opcode adds at most one value of fixed size, so memory is bounded by [`OPCODES`]; nothing is recursive.
//!
//! Source: Python's `pickletools.py`; `_rebuild_tensor_v2` and `_rebuild_parameter` of `torch/_utils.py`.

use std::collections::HashMap;

use safetensors::Dtype;

use super::Problem;

/// Opcodes that a pickle may have: a tensor takes some forty, a large model has a thousand tensors.
const OPCODES: usize = 1_000_000;

/// Values on the stack; Python's writer adds items to a dict a thousand at a time.
const STACK: usize = 100_000;

/// Marks on the stack, the depth of what is being built.
const MARKS: usize = 100;

/// Dimensions of a tensor.
const DIMENSIONS: usize = 16;

/// A tensor as the pickle describes it; nothing of it is checked against its storage.
#[derive(Debug, Clone)]
pub(super) struct Saved<'a> {
    pub(super) dtype: Dtype,
    /// Name of the storage.
    pub(super) storage: &'a str,
    /// Elements of the storage.
    pub(super) elements: usize,
    /// First element in the storage.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Elements between neighbours, for each dimension.
    pub(super) strides: Vec<usize>,
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    fn find(module: &str, name: &str) -> Result<Self, Problem> {
        let storage = |dtype| Ok(Self::Storage(dtype));
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Self::RebuildParameter),
            ("torch", "BFloat16Storage") => storage(Dtype::BF16),
            ("torch", "HalfStorage") => storage(Dtype::F16),
            ("torch", "FloatStorage") => storage(Dtype::F32),
            ("torch", "DoubleStorage") => storage(Dtype::F64),
            ("torch", "LongStorage") => storage(Dtype::I64),
            ("torch", "IntStorage") => storage(Dtype::I32),
            ("torch", "ShortStorage") => storage(Dtype::I16),
            ("torch", "CharStorage") => storage(Dtype::I8),
            ("torch", "ByteStorage") => storage(Dtype::U8),
            ("torch", "BoolStorage") => storage(Dtype::BOOL),
            _ => Err(Problem::Code(printable(&format!("{module}.{name}")))),
        }
    }
}

/// A text of the file in a message: short, without control characters.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .take(120)
        .flat_map(char::escape_debug)
        .collect()
}

/// A value; containers are numbers of their content.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'a str),
    List(usize),
    Tuple(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

/// A storage: type, name and elements.
type Storage<'a> = (Dtype, &'a str, usize);

#[derive(Default)]
struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    lists: Vec<Vec<Value<'a>>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<[Value<'a>; 2]>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<Saved<'a>>,
}

/// Names and tensors of a pickled state dict, in its order.
///
/// # Errors
/// The pickle is damaged, holds something else, or asks for code to be run.
pub(super) fn state_dict(code: &[u8]) -> Result<Vec<(&str, Saved<'_>)>, Problem> {
    let mut machine = Machine {
        code,
        ..Machine::default()
    };
    let Value::Dict(top) = machine.run()? else {
        return content("its pickle holds no dict");
    };
    let mut found = Vec::new();
    for [key, value] in &machine.dicts[top] {
        match (*key, *value) {
            (Value::Text(name), Value::Tensor(tensor)) => {
                found.push((name, machine.tensors[tensor].clone()));
            }
            (Value::Text(name), _) => {
                return content(format!("the key `{}` holds no tensor", printable(name)));
            }
            _ => return content("a key is no text"),
        }
    }
    Ok(found)
}

fn content<T>(reason: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Content(reason.into()))
}

fn damaged(reason: impl Into<String>) -> Problem {
    Problem::Damaged(format!("its pickle {}", reason.into()))
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value<'a>, Problem> {
        for _ in 0..OPCODES {
            let [opcode] = self.array()?;
            if opcode == b'.' {
                return match self.stack.as_slice() {
                    [top] if self.at == self.code.len() && self.marks.is_empty() => Ok(*top),
                    _ => Err(damaged("does not end with one value")),
                };
            }
            self.step(opcode)?;
            if self.stack.len() > STACK || self.marks.len() > MARKS {
                return Err(damaged("is nested too deeply"));
            }
        }
        Err(damaged(format!("has more than {OPCODES} opcodes")))
    }

    fn step(&mut self, opcode: u8) -> Result<(), Problem> {
        match opcode {
            // PROTO, FRAME
            0x80 => {
                let [version] = self.array()?;
                if !(2..=5).contains(&version) {
                    return Err(damaged(format!("is of protocol {version}")));
                }
            }
            0x95 => drop(self.array::<8>()?),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            // BININT, BININT1, BININT2, LONG1, BINFLOAT
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'K' => {
                let [value] = self.array()?;
                self.stack.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            0x8a => {
                let [length] = self.array()?;
                let bytes = self.take(length.into())?;
                if bytes.len() > 8 {
                    return Err(damaged("holds a number of more than 64 bits"));
                }
                let filled = match bytes.last() {
                    Some(last) if last & 0x80 != 0 => 0xff,
                    _ => 0,
                };
                let mut value = [filled; 8];
                value[..bytes.len()].copy_from_slice(bytes);
                self.stack.push(Value::Int(i64::from_le_bytes(value)));
            }
            b'G' => {
                self.array::<8>()?;
                self.stack.push(Value::Float);
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length.into())?;
            }
            0x8c => {
                let [length] = self.array()?;
                self.text(length.into())?;
            }
            0x8d => {
                let length = u64::from_le_bytes(self.array()?);
                self.text(length)?;
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Global(Global::find(module, name)?));
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => {
                    self.stack.push(Value::Global(Global::find(module, name)?));
                }
                _ => return Err(damaged("names a global without its module")),
            },
            // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' => {
                let [place] = self.array()?;
                self.memoize(place.into())?;
            }
            b'r' => {
                let place = u32::from_le_bytes(self.array()?);
                self.memoize(place)?;
            }
            0x94 => self.memoize(self.memo.len() as u32)?,
            b'h' => {
                let [place] = self.array()?;
                self.recall(place.into())?;
            }
            b'j' => {
                let place = u32::from_le_bytes(self.array()?);
                self.recall(place)?;
            }
            // EMPTY_TUPLE, TUPLE, TUPLE1, TUPLE2, TUPLE3
            b')' => self.tuple(Vec::new()),
            b't' => {
                let values = self.pop_mark()?;
                self.tuple(values);
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let from = self.floor(count)?;
                let values = self.stack.split_off(from);
                self.tuple(values);
            }
            // EMPTY_LIST, APPEND, APPENDS
            b']' => {
                self.stack.push(Value::List(self.lists.len()));
                self.lists.push(Vec::new());
            }
            b'a' => {
                let value = self.pop()?;
                self.list()?.push(value);
            }
            b'e' => {
                let values = self.pop_mark()?;
                self.list()?.extend(values);
            }
            // EMPTY_DICT, SETITEM, SETITEMS
            b'}' => self.dict(),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.items()?.push([key, value]);
            }
            b'u' => {
                let values = self.pop_mark()?;
                let (pairs, rest) = values.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err(damaged("sets a key without a value"));
                }
                self.items()?.extend_from_slice(pairs);
            }
            // BINPERSID, REDUCE, BUILD
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b'b' => {
                // Attributes of an `OrderedDict`: `_metadata`, the versions of modules.
                self.pop()?;
                self.items()?;
            }
            other => {
                return Err(Problem::Code(format!("opcode 0x{other:02x}")));
            }
        }
        Ok(())
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], Problem> {
        let end = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count));
        let taken = end.and_then(|end| self.code.get(self.at..end));
        let taken = taken.ok_or_else(|| damaged("ends inside a value"))?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn text(&mut self, length: u64) -> Result<(), Problem> {
        let bytes = self.take(length)?;
        let text =
            std::str::from_utf8(bytes).map_err(|_| damaged("holds text that is not UTF-8"))?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, Problem> {
        let rest = &self.code[self.at..];
        let length = rest.iter().take(1000).position(|byte| *byte == b'\n');
        let length = length.ok_or_else(|| damaged("holds a name without an end"))?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| damaged("holds text that is not UTF-8"))
    }

    /// Place on the stack above which `count` values are, all after the last mark.
    fn floor(&self, count: usize) -> Result<usize, Problem> {
        let lowest = self.marks.last().copied().unwrap_or(0);
        self.stack
            .len()
            .checked_sub(count)
            .filter(|floor| *floor >= lowest)
            .ok_or_else(|| damaged("takes a value that is not there"))
    }

    fn pop(&mut self) -> Result<Value<'a>, Problem> {
        let floor = self.floor(1)?;
        let value = self.stack[floor];
        self.stack.truncate(floor);
        Ok(value)
    }

    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>, Problem> {
        let mark = self.marks.pop();
        let mark = mark.ok_or_else(|| damaged("takes a mark that is not there"))?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Result<Value<'a>, Problem> {
        Ok(self.stack[self.floor(1)?])
    }

    fn memoize(&mut self, place: u32) -> Result<(), Problem> {
        let value = self.top()?;
        self.memo.insert(place, value);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Result<(), Problem> {
        let value = self.memo.get(&place).copied();
        let value = value.ok_or_else(|| damaged("recalls a value that it did not keep"))?;
        self.stack.push(value);
        Ok(())
    }

    fn tuple(&mut self, values: Vec<Value<'a>>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(values);
    }

    fn dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    /// Values of the list on top.
    fn list(&mut self) -> Result<&mut Vec<Value<'a>>, Problem> {
        match self.top()? {
            Value::List(list) => Ok(&mut self.lists[list]),
            _ => Err(damaged("appends to what is no list")),
        }
    }

    /// Items of the dict on top.
    fn items(&mut self) -> Result<&mut Vec<[Value<'a>; 2]>, Problem> {
        match self.top()? {
            Value::Dict(dict) => Ok(&mut self.dicts[dict]),
            _ => Err(damaged("sets items of what is no dict")),
        }
    }

    fn pop_tuple(&mut self) -> Result<Vec<Value<'a>>, Problem> {
        match self.pop()? {
            Value::Tuple(tuple) => Ok(self.tuples[tuple].clone()),
            _ => Err(damaged("passes what is no tuple")),
        }
    }

    /// `("storage", type, name, location, elements)`.
    fn storage(&mut self) -> Result<(), Problem> {
        match self.pop_tuple()?.as_slice() {
            [
                Value::Text("storage"),
                Value::Global(Global::Storage(dtype)),
                Value::Text(name),
                Value::Text(_),
                Value::Int(elements),
            ] => {
                self.stack.push(Value::Storage(self.storages.len()));
                self.storages.push((*dtype, *name, whole(*elements)?));
                Ok(())
            }
            _ => Err(damaged("names something else than a storage")),
        }
    }

    fn reduce(&mut self) -> Result<(), Problem> {
        let arguments = self.pop_tuple()?;
        let Value::Global(global) = self.pop()? else {
            return Err(damaged("calls what is no function"));
        };
        match (global, arguments.as_slice()) {
            (Global::OrderedDict, []) => self.dict(),
            (
                Global::RebuildTensor,
                [
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(shape),
                    Value::Tuple(strides),
                    Value::Bool,
                    Value::Dict(hooks),
                    rest @ ..,
                ],
            ) => {
                // Since PyTorch 2.0 a tensor's metadata may follow, which is about views of complex numbers.
                let plain = match rest {
                    [] | [Value::None] => true,
                    [Value::Dict(metadata)] => self.dicts[*metadata].is_empty(),
                    _ => false,
                };
                if !plain || !self.dicts[*hooks].is_empty() {
                    return content("a tensor has hooks or metadata");
                }
                let (dtype, storage, elements) = self.storages[*storage];
                let saved = Saved {
                    dtype,
                    storage,
                    elements,
                    offset: whole(*offset)?,
                    shape: self.sizes(*shape)?,
                    strides: self.sizes(*strides)?,
                };
                if saved.shape.len() != saved.strides.len() {
                    return Err(damaged("gives a tensor more sizes than strides, or fewer"));
                }
                self.stack.push(Value::Tensor(self.tensors.len()));
                self.tensors.push(saved);
            }
            (
                Global::RebuildParameter,
                [Value::Tensor(tensor), Value::Bool, Value::Dict(hooks)],
            ) => {
                if !self.dicts[*hooks].is_empty() {
                    return content("a parameter has hooks");
                }
                self.stack.push(Value::Tensor(*tensor));
            }
            _ => return Err(damaged(format!("calls {global:?} with other arguments"))),
        }
        Ok(())
    }

    fn sizes(&self, tuple: usize) -> Result<Vec<usize>, Problem> {
        let values = &self.tuples[tuple];
        if values.len() > DIMENSIONS {
            return Err(damaged(format!(
                "gives a tensor {} dimensions",
                values.len()
            )));
        }
        let size = |value: &Value<'a>| match value {
            Value::Int(size) => whole(*size),
            _ => Err(damaged("gives a size that is no number")),
        };
        values.iter().map(size).collect()
    }
}

fn whole(value: i64) -> Result<usize, Problem> {
    usize::try_from(value).map_err(|_| damaged(format!("holds the size {value}")))
}
